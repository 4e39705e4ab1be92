"""Time and memory of work on a device; every check measures with these."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_moe.runtime.wait import waiter

GIB = 2**30
WARMUP = 2
"""Calls before the timed ones: they load kernels, choose algorithms and compile."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work."""
    waiter(device)()


def milliseconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 8) -> float:
    """Return the median time of a call, in milliseconds, with the device idle before and after."""
    for _ in range(WARMUP):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def peak_gib(run: Callable[[], Any], device: torch.device) -> float:
    """Return the GiB that a call allocates at its peak; 0 on a CPU, where torch does not count."""
    if device.type == "cpu":
        return 0.0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def product_tflops(device: torch.device, *, size: int, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a product of two square matrices: what this device reaches now."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    elapsed = milliseconds(lambda: torch.mm(a, b, out=out), device, repeats=10)
    return 2 * size**3 / elapsed / 1e9


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value, in float64."""
    expected = expected.double()
    difference = (result.double() - expected).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))


def world_device(kind: Literal["cpu", "cuda"]) -> torch.device:
    """Return the device of the only rank."""
    return torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
