"""The fitted constants of the time model, and their priors."""

from __future__ import annotations

from dataclasses import dataclass


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
