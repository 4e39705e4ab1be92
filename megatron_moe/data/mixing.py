"""Update rules for the weights of an adaptive mixture during training.

Every weight is a share of samples. All tuples of this module follow the order of the domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_moe.config.data import Mixing
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
    """Return the weights after one update, raising domains whose loss exceeds the reference.

    The rule::

        w' = w * exp(step_size * excess), scaled to sum 1
        result = (1 - floor) * w' + floor / number of domains

    ``sheared_llama``: excess is ``max(0, loss - reference)``, so a domain below its reference
    loses only the share that others gain (Sheared LLaMA, arXiv 2310.06694, Algorithm 1).
    ``doremi``: excess is ``loss - reference``, as the code released with that paper computes it
    under this name. The floor comes from DoReMi (arXiv 2305.10429, Algorithm 1) and keeps every
    weight positive.

    Args:
        weights: Current shares, all positive, with sum 1.
        losses: Current validation losses, in nats per token.
        references: Target losses of each domain, in nats per token.
        rule: See above.
        step_size: Change of a log weight per nat of excess.
        floor: Share that is spread evenly over the domains.

    Raises:
        DataError: A loss is not a finite number.
    """
    excess = np.asarray(losses, dtype=np.float64) - np.asarray(references, dtype=np.float64)
    if not np.isfinite(excess).all():
        raise DataError(
            f"cannot update the mixture: losses {[*losses]} and references {[*references]} must "
            "be finite"
        )
    if rule == "sheared_llama":
        excess = np.maximum(excess, 0.0)
    # Subtract the maximum in log space: exp of a large excess would overflow.
    logits = np.log(np.asarray(weights, dtype=np.float64)) + step_size * excess
    scaled = np.exp(logits - logits.max())
    mixed = (1 - floor) * scaled / scaled.sum() + floor / len(scaled)
    return tuple(float(weight) for weight in mixed / mixed.sum())


def adapted_weights(
    weights: Sequence[float], losses: Sequence[float], references: Sequence[float], mixing: Mixing
) -> tuple[float, ...]:
    """Call `updated_weights` with the settings of a run.

    Losses are first rounded to 1e-4 nats. Layouts sum in different orders, and a difference in the
    seventh digit must not change which samples are drawn.
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
    """Return the number of multiples of ``interval`` in ``(before, after]``, e.g. tokens seen.

    The result depends on the position alone, so a resumed run updates at the same points.
    """
    return after // interval - before // interval
