"""Rules that move the weights of a mixture while training, and what they measure against.

Every weight is a share of samples. All tuples of this module follow the order of the domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_moe.config.run import Mixing
from megatron_moe.errors import DataError

Rule = Literal["sheared_llama", "doremi"]


def updated_weights(
    weights: Sequence[float],
    losses: Sequence[float],
    references: Sequence[float],
    *,
    rule: Rule,
    step_size: float = 1.0,
    floor: float = 1e-4,
) -> tuple[float, ...]:
    """Weights after one update: more of the domains that are worse than they should be.

    The rule::

        w' = w * exp(step_size * excess), scaled to sum 1
        result = (1 - floor) * w' + floor / number of domains

    ``sheared_llama``: excess is ``max(0, loss - reference)``, so a domain that is better than its
    reference only loses what others gain (Sheared LLaMA, arXiv 2310.06694, Algorithm 1).
    ``doremi``: excess is ``loss - reference``, as the code released with that paper computes it
    under this name. The floor is of DoReMi (arXiv 2305.10429, Algorithm 1): no domain dies.

    Args:
        weights: Current shares, all positive, sum 1.
        losses: Validation losses now, in nats per token.
        references: Losses that each domain should reach, in nats per token.
        rule: See above.
        step_size: How strongly a nat of excess moves a weight.
        floor: Share that is spread evenly.

    Raises:
        DataError: A loss is not a finite number.
    """
    excess = np.asarray(losses, dtype=np.float64) - np.asarray(references, dtype=np.float64)
    if not np.isfinite(excess).all():
        raise DataError(
            f"cannot update the mixture: losses {[*losses]} against references {[*references]}"
        )
    if rule == "sheared_llama":
        excess = np.maximum(excess, 0.0)
    # In logarithms, less their maximum: exp of a large excess would overflow.
    logits = np.log(np.asarray(weights, dtype=np.float64)) + step_size * excess
    moved = np.exp(logits - logits.max())
    mixed = (1 - floor) * moved / moved.sum() + floor / len(moved)
    return tuple(float(weight) for weight in mixed / mixed.sum())


def moved(
    weights: Sequence[float], losses: Sequence[float], references: Sequence[float], mixing: Mixing
) -> tuple[float, ...]:
    """`updated_weights` by a run's settings.

    Losses are rounded to 1e-4 nats first: layouts sum in other orders, and one that differs in the
    seventh digit must not draw another sample.
    """
    assert mixing.update != "never"
    return updated_weights(
        weights,
        [round(loss, 4) for loss in losses],
        references,
        rule=mixing.update,
        step_size=mixing.step_size,
        floor=mixing.floor,
    )


def updates_due(before: int, after: int, *, interval: int) -> int:
    """How many multiples of ``interval`` lie in ``(before, after]``, e.g. tokens seen.

    A function of the position alone, so a resumed run updates where the first would have.
    """
    return after // interval - before // interval
