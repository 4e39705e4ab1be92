"""Record the commit, device and versions of the checks, as `megatron_moe.bench` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_moe.bench import surroundings


def describe() -> dict[str, Any]:
    """Return what a figure must be read with."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name, memory_bytes = surroundings.device_of(device)
    commit, changed = surroundings.commit_of(Path(__file__).parent)
    return {
        "device": name,
        "memory_gib": round(memory_bytes / surroundings.GIB, 1),
        "commit": f"{commit or 'unknown'}{'+' if changed else ''}",
        **surroundings.versions(),
    }
