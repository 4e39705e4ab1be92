"""The dense matrix-product peak that MFU divides by: a data sheet's on a GPU, measured on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_moe.plan.hardware import GPUS


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of one rank's device, and where the number comes from."""

    flops_per_second: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """What a large matrix product reaches: from the table, or measured in about a second."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        device_name = torch.cuda.get_device_name(device).lower()
        for gpu in GPUS.values():
            if gpu.name in device_name:
                return Peak(gpu.peak_flops, f"{gpu.name} data sheet, bf16 dense")
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype, size: int = 1024) -> Peak:
    a = torch.randn(size, size).to(device, dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    flops = 2 * size**3 / min(seconds)  # a peak is what was reached, not what is usual
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    name = str(dtype).removeprefix("torch.")
    return Peak(flops, f"measured at start: {size}^3 {name} matrix product{threads}")
