"""Exchange small values between all ranks in one collective."""

from __future__ import annotations

import torch
import torch.distributed as dist


def any_rank(*conditions: bool) -> list[bool]:
    """Return for each condition whether it is true on any rank; the same result on every rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor(conditions, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def gathered(text: str) -> list[str]:
    """Return the text of every rank, in rank order."""
    texts = [text] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts
