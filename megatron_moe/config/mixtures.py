"""Initial domain weights of a mixture: configured ones and published ones.

Every weight is a fraction of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_moe.config.data import Data
from megatron_moe.errors import ConfigError

SINGLE = "text"
"""Name of the single domain of a run with ``data.path``."""

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
    """Return the weights scaled to sum to exactly 1, if they are close to it.

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
            + "\n  remove domains that should not be sampled"
        )
    total = math.fsum(weights.values())
    scaled = {name: weight / total for name, weight in weights.items()}
    if abs(total - 1) > 1e-3:
        shares = ", ".join(f"{name}: {weight:.4g}" for name, weight in scaled.items())
        raise ConfigError(
            f"weights of the domains sum to {total:.6g}, and must sum to 1: they are shares of "
            f"samples.\n  with these proportions: {shares}"
        )
    return scaled


def preset_weights(preset: str, domains: Sequence[str]) -> dict[str, float]:
    """Return published weights for ``domains``, which must be the seven of SlimPajama.

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
            "  rename the domains, or set data.domains.*.weight"
        )
    return check_weights({name: PRESETS[preset][name] for name in domains})


def starting_weights(data: Data) -> dict[str, float]:
    """Return the initial weight of each domain; a run with ``data.path`` has one domain.

    Raises:
        ConfigError: The weights do not sum to 1, or the preset is for other domains.
    """
    if data.domains is None:
        return {SINGLE: 1.0}
    given = {name: d.weight for name, d in data.domains.items() if d.weight is not None}
    if data.mixing.weights == "given":
        if without := [name for name in data.domains if name not in given]:
            raise ConfigError(
                f"{', '.join(f'data.domains.{name}' for name in without)} must have a weight: "
                "data.mixing.weights is given"
            )
        return check_weights(given)
    if given:
        raise ConfigError(
            f"data.domains.{next(iter(given))}.weight is set, but data.mixing.weights is "
            f"{data.mixing.weights}, which brings its own.\n  leave out one of the two"
        )
    return preset_weights(data.mixing.weights, tuple(data.domains))
