"""Faults of a device that computes wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from faults.fault import FAULT_STEP, Fault


def flipped_gradient(rank: int) -> Fault:
    """Flip a bit of a gradient in a step that is computed twice, before its last backward pass."""

    def prepare(_: Path) -> None:
        from megatron_moe.commands import pretraining

        step = pretraining.train_step

        def damaging(state: Any, batches: Any, *args: Any, at: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == rank and state.step + 1 == FAULT_STEP:
                at = _flipping(state, at, 2 * len(batches))
            return step(state, batches, *args, at=at, **kwargs)

        pretraining.train_step = damaging

    return Fault(
        name=f"rank {rank} computes a wrong gradient once",
        prepare=prepare,
        changes=(f"guard.device_check_interval={FAULT_STEP}",),
    )


def _flipping(state: Any, at: Callable[[str], None], when: int) -> Callable[[str], None]:
    passes: list[str] = []

    def flip(stage: str) -> None:
        at(stage)
        if stage == "backward":
            passes.append(stage)
            if len(passes) == when:
                bits = state.wrapped[0].buffers[0].grad_data.view(torch.int32)
                bits[int(bits.abs().argmax())] ^= 1 << 26

    return flip
