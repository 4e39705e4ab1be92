"""Weights of a mixture of domains: published ones, and rules that move them while training.

Every weight is a share of samples. Domains are named; all tuples of this module follow the order
of the names they came with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_moe.errors import ConfigError, DataError

Rule = Literal["sheared", "doremi"]

SLIMPAJAMA = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")


def _slimpajama(*values: float) -> dict[str, float]:
    return dict(zip(SLIMPAJAMA, values, strict=True))


# The two static mixtures of LLaMA-MoE (arXiv 2406.16554).
PRESETS: dict[str, dict[str, float]] = {
    "llama": _slimpajama(0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02),
    "sheared": _slimpajama(0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.010),
}

# The same paper: losses of LLaMA-2-7B on each domain, in nats per token.
LLAMA_2_7B_LOSSES = _slimpajama(1.6917, 2.0749, 0.6984, 1.5899, 1.9253, 1.2408, 1.4975)


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights scaled to sum to 1 in the last bit, once they are close to it.

    Raises:
        ConfigError: No domain, a weight that is not a positive number, or a sum that is not 1.
    """
    if not weights:
        raise ConfigError("a mixture needs at least one domain")
    if bad := {name: w for name, w in weights.items() if not (0 < w < math.inf)}:
        raise ConfigError(
            "\n".join(
                f"weight of domain {name!r} ({w}) must be positive" for name, w in bad.items()
            )
            + "\n  leave out a domain that is not to be drawn"
        )
    total = math.fsum(weights.values())
    scaled = {name: weight / total for name, weight in weights.items()}
    if abs(total - 1) > 1e-3:
        shares = ", ".join(f"{name}: {weight:.4g}" for name, weight in scaled.items())
        raise ConfigError(
            f"weights of the domains sum to {total:.6g}, and must sum to 1: they are shares of "
            f"samples.\n  in these proportions: {shares}"
        )
    return scaled


def preset_weights(preset: str, domains: Sequence[str]) -> dict[str, float]:
    """Published weights for the ``domains`` at hand, which must be the seven of SlimPajama.

    Raises:
        ConfigError: No such preset, or other domains than it has weights for.
    """
    if preset not in PRESETS:
        raise ConfigError(f"mixture {preset!r} is not known; known: {', '.join(PRESETS)}")
    if set(domains) != set(SLIMPAJAMA):
        missing, unknown = set(SLIMPAJAMA) - set(domains), set(domains) - set(SLIMPAJAMA)
        raise ConfigError(
            f"mixture {preset!r} is for the domains {', '.join(SLIMPAJAMA)}: "
            f"missing {sorted(missing)}, without a weight {sorted(unknown)}.\n"
            "  rename the domains, or give weights of your own"
        )
    return check_weights({name: PRESETS[preset][name] for name in domains})


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

    ``sheared``: excess is ``max(0, loss - reference)``, so a domain that is better than its
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
    if rule == "sheared":
        excess = np.maximum(excess, 0.0)
    # In logarithms, less their maximum: exp of a large excess would overflow.
    logits = np.log(np.asarray(weights, dtype=np.float64)) + step_size * excess
    moved = np.exp(logits - logits.max())
    mixed = (1 - floor) * moved / moved.sum() + floor / len(moved)
    return tuple(float(weight) for weight in mixed / mixed.sum())


def updates_due(before: int, after: int, *, interval: int) -> int:
    """How many multiples of ``interval`` lie in ``(before, after]``, e.g. tokens seen.

    A function of the position alone, so a resumed run updates where the first would have.
    """
    return after // interval - before // interval


def read_reference_losses(path: Path, domains: Sequence[str]) -> dict[str, float]:
    """Losses in nats per token from a JSON object ``{domain: loss}``.

    Raises:
        DataError: Not such a file, or no loss for one of ``domains``.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the reference losses {path}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold an object {{domain: loss}}, not {type(found).__name__}")
    if missing := [name for name in domains if not _is_loss(found.get(name))]:
        raise DataError(
            f"{path} has no loss for {', '.join(missing)}; it has {', '.join(found) or 'none'}"
        )
    return {name: float(found[name]) for name in domains}


def _is_loss(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
