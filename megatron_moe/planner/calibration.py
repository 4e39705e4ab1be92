"""The fitted constants of the time model, and their priors."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_moe.errors import ConfigError
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import regular


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Three constants that no data sheet lists. The defaults are the priors of the fit."""

    gemm_efficiency: float = 0.75
    """Fraction of the peak that a compute-bound matrix product reaches."""
    link_efficiency: float = 0.65
    """Fraction of a link's data-sheet bandwidth that a collective reaches."""
    layer_overhead_seconds: float = 1.0e-3
    """Overhead of one micro-batch in one MoE layer, forward and backward: launches, host
    synchronization on the routing result, and small kernels of the router."""


PRIOR = Calibration()

FITTED = Calibration(
    gemm_efficiency=0.732,
    link_efficiency=0.662,
    layer_overhead_seconds=1.056e-3,
)
"""Result of a fit to published throughput, by research/calibration; see docs/planning.md."""


def read_constants(path: Path) -> Calibration:
    """Read the constants that ``plan --calibrate`` wrote.

    Raises:
        ConfigError: The file cannot be read or holds other values.
    """
    names = {field.name for field in fields(Calibration)}
    try:
        tree = parse_json(regular(path).read_text(encoding="utf-8"))["constants"]
        values = {name: float(tree[name]) for name in names}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no constants of the time model: {error}.\n"
            "  megatron-moe plan --calibrate RECORDS --constants FILE writes such a file"
        ) from error
    if bad := [f"{name} ({value})" for name, value in values.items() if not 0 < value < math.inf]:
        raise ConfigError(f"{path}: {', '.join(bad)} must be positive numbers")
    return Calibration(**values)
