"""The fitted constants of the time model, and what they were before any row was seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Three constants that no data sheet gives. The defaults are the priors of the fit."""

    gemm_efficiency: float = 0.75
    """Part of the peak that a matrix product reaches when memory does not bound it."""
    link_efficiency: float = 0.65
    """Part of a link's data-sheet bandwidth that a collective reaches."""
    layer_overhead_seconds: float = 1.0e-3
    """Of one micro-batch in one MoE layer, forward and backward: launches, host
    synchronisation on the routing result, small kernels of the router."""


PRIOR = Calibration()

FITTED = Calibration(
    gemm_efficiency=0.783,
    link_efficiency=0.661,
    layer_overhead_seconds=9.07e-4,
)
"""`fit` over all rows of published_mfu.yaml; docs/planning.md is printed with it."""
