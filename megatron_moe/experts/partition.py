"""Define what a construction method gets and returns: evidence in, a partition out.

Shape letters: E num_moe_experts, D hidden_size, F dense neurons, M neurons of one expert, S shared
neurons, C clusters of the text (= E), O experts of a MoE source.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def _none() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Partition:
    """Source neurons of the routed experts and of the shared expert."""

    neurons_EM: NDArray[np.int64]
    shared_S: NDArray[np.int64] = field(default_factory=_none)
    expert_E: NDArray[np.int64] | None = None
    """Source expert that the neurons of each expert belong to; None for a dense source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Facts about one layer that a method may ask for; None where it did not."""

    up_FD: NDArray[np.float32] | None = None
    """Weights of ``up``, for methods that need weights."""
    importance_CF: NDArray[np.float64] | None = None
    """Importance of each neuron for each cluster of the text, for methods that need text."""
    activity_CF: NDArray[np.float64] | None = None
    """Mean magnitude of each neuron's activation on each cluster, for methods that need text."""
    contribution_HF: NDArray[np.float32] | None = None
    """Norm of each neuron's contribution to the output for H sampled tokens, for methods that need
    text."""
    score_O: NDArray[np.float64] | None = None
    """Score of each expert of a MoE source by ``upcycle.choose``."""
