"""Peak of dense matrix products, the denominator of MFU: from data sheets, or measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from megatron_moe.planner.hardware import GPUS


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak FLOP/s of one rank's device, and the source of that number."""

    flops_per_second: float
    source: str


# Keyed by the name that the driver reports, because cards of one generation differ. Values are from
# NVIDIA data sheets, bf16 without sparsity. The planner's table holds the SXM parts. A card that is
# not listed here is measured.
DATA_SHEETS: tuple[tuple[str, float], ...] = (
    (r"\bA100\b", GPUS["a100"].peak_flops),  # both SXM and PCIe
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100\b.*\bHBM3\b", GPUS["h100"].peak_flops),  # "H100 80GB HBM3" is the SXM5 part
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH200$", GPUS["h200"].peak_flops),
    (r"\bB200$", GPUS["b200"].peak_flops),
)


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak from the card's data sheet, or measure it, which takes about a second."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        device_name = torch.cuda.get_device_name(device)
        for pattern, flops_per_second in DATA_SHEETS:
            if re.search(pattern, device_name):
                return Peak(flops_per_second, f"{device_name} data sheet, bf16 dense")
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    # Large enough to keep the device busy. Three products on a CPU already take 0.1 s.
    size, count = (8192, 6) if device.type == "cuda" else (1024, 3)
    a = torch.randn(size, size).to(device, dtype)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    flops = 2 * size**3 / min(seconds)  # the fastest run, because this is a peak and not a mean
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    name = str(dtype).removeprefix("torch.")
    return Peak(flops, f"measured at start: {size}^3 {name} matrix product{threads}")
