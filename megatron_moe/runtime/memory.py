"""Measure this rank's memory: device memory on CUDA, resident memory on CPU."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Return the peak memory in bytes since `reset_peak`; without /proc, the current memory."""
    if _on_cuda():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return held_bytes()


def held_bytes() -> int:
    """Return the current memory in bytes."""
    return torch.cuda.memory_allocated() if _on_cuda() else resident_bytes()


def resident_bytes() -> int:
    """Return the host memory that this process holds, in bytes, on any device."""
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Reset `peak_bytes` to the current memory."""
    if _on_cuda():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def _on_cuda() -> bool:
    # The order matters: is_available alone may initialize the driver.
    return torch.cuda.is_initialized() and torch.cuda.is_available()
