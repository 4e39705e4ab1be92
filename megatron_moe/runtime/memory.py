"""How much memory this rank has held at most: device memory on CUDA, resident memory on CPU."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Most memory held since `reset_peak`; on systems without /proc, what is held now."""
    if _on_cuda():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return held_bytes()


def held_bytes() -> int:
    """Memory held now."""
    return torch.cuda.memory_allocated() if _on_cuda() else psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Start `peak_bytes` anew at what is held now."""
    if _on_cuda():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def _on_cuda() -> bool:
    # Whether CUDA is available is asked second: the question alone may initialize the driver.
    return torch.cuda.is_initialized() and torch.cuda.is_available()
