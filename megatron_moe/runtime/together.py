"""What ranks agree on in one small collective."""

from __future__ import annotations

import torch
import torch.distributed as dist


def any_rank(*mine: bool) -> list[bool]:
    """Which of several things are true on any rank; the same answer on every rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor(mine, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def gathered(mine: str) -> list[str]:
    """Return every rank's text, in the order of the ranks."""
    texts = [mine] * dist.get_world_size()
    dist.all_gather_object(texts, mine)
    return texts
