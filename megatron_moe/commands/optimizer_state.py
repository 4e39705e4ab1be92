"""Take AdamW's moments over from the run that a MoE source was exported from.

A moment is a tensor like the weight it belongs to, so the same rules read it: each expert's moments
go to its copies, rows of routers likewise. Of m copies, each one has 1/m of the weight or 1/m of
the tokens, so its gradient is 1/m of the expert's: it gets 1/m of the mean of gradients and 1/m^2
of the mean of squares. AdamW's update, their quotient, is then that of the expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.folder import Progress, find_checkpoint, read_progress
from megatron_moe.checkpoint.moments import owned, set_updates_made
from megatron_moe.commands.job import Job
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.names import Match, dense_tensors, match
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.model.build import Model
from megatron_moe.model.upcycle import fill
from megatron_moe.parallel.layout import local_experts
from megatron_moe.source.open import DistributedSource, open_moments
from megatron_moe.train.state import TrainState

POWERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""AdamW's moments, and the power of a gradient that each of them averages."""
_COMPARED = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class InheritedState:
    """Optimizer state of the run that the source was exported from."""

    checkpoint: Path
    updates: int
    moments: dict[str, DistributedSource]
    """One per moment, with values under the names of the source's tensors."""


def open_optimizer_state(folder: Path, source: SourceCheckpoint) -> InheritedState:
    """Open the moments that belong to a MoE source.

    Args:
        folder: Run that the source was exported from, or one of its checkpoints.
        source: The MoE.

    Raises:
        CheckpointError: There is no checkpoint, it holds no moments, or is not of the source.
    """
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"source.optimizer_state ({folder}) must be a run with a checkpoint, or a checkpoint.\n"
            f"  {error}\n  leave it unset: moments then begin at zero"
        ) from error
    progress = read_progress(checkpoint)
    _check_updates(checkpoint, progress)
    weights = _opened(checkpoint, source, "")
    ours = source.read(_COMPARED)  # equal shapes do not tell one step of a run from another
    if not torch.equal(weights.read(_COMPARED).to(ours.dtype), ours):
        raise _other_model(checkpoint, source, f"{_COMPARED} has other values")
    moments = {moment: _opened(checkpoint, source, moment) for moment in POWERS}
    return InheritedState(checkpoint, progress.optimizer_updates, moments)


@torch.no_grad()
def take_optimizer_state(
    job: Job, state: TrainState, inherited: InheritedState, plan: ExpertPlan
) -> None:
    """Fill the moments of a new run's optimizer, and set its number of updates.

    Needs 4 bytes of host memory per local parameter while it reads.

    Args:
        job: The job.
        state: State of step 0, whose model is filled.
        inherited: Moments of the source.
        plan: Which source expert each expert is a copy of.
    """
    values: dict[Tensor, Tensor] = {
        p: torch.zeros(p.shape) for m in state.model.modules for p in m.parameters()
    }
    for moment, stored in inherited.moments.items():
        fill(state.model, [stored], plan, layout=job.layout, rank=job.world.rank, into=values)
        _divide_among_copies(job, state.model, plan, values, POWERS[moment])
        for kept in owned(state.optimizer):
            target = kept.tensors[moment]
            flat = values[kept.parameter].view(-1)
            target.copy_(flat[kept.begin : kept.begin + len(target)])
    set_updates_made(state.optimizer, inherited.updates)
    job.say(f"Took over AdamW's moments of {inherited.updates} updates from {inherited.checkpoint}")


def _check_updates(checkpoint: Path, progress: Progress) -> None:
    updates = set((progress.updates_by_role or {}).values()) | {progress.optimizer_updates}
    if updates == {0} or len(updates) > 1:
        counts = progress.updates_by_role or progress.optimizer_updates
        raise CheckpointError(
            f"source.optimizer_state ({checkpoint}) must hold moments of equally many updates of "
            f"all parameters, but it holds {counts}.\n"
            "  leave source.optimizer_state unset: moments then begin at zero"
        )


def _opened(checkpoint: Path, source: SourceCheckpoint, moment: str) -> DistributedSource:
    try:
        moments = open_moments(checkpoint, source.spec, moment)
        moments.check_tensors(dict(dense_tensors(moments.spec)))
    except CheckpointError as error:
        raise _other_model(checkpoint, source, f"moment {moment}: {error}") from error
    return moments


def _other_model(checkpoint: Path, source: SourceCheckpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"source.optimizer_state ({checkpoint}) must be the checkpoint that source.path "
        f"({source.folder}) was exported from, trained with AdamW and nothing frozen.\n"
        f"  {why}\n  name that checkpoint, or leave source.optimizer_state unset"
    )


def _divide_among_copies(
    job: Job, model: Model, plan: ExpertPlan, values: dict[Tensor, Tensor], power: int
) -> None:
    """Divide moments of experts and router rows by the number of copies, to this power."""
    experts = local_experts(job.layout, rank=job.world.rank, num_experts=plan.recipe.num_experts)
    for chunk in model.chunks:
        for name, parameter in chunk.module.named_parameters():
            matched = match(name)
            assert matched is not None, name
            layer = None if matched.layer is None else chunk.layers[matched.layer]
            if layer in plan.recipe.moe_layers and _by_expert(matched):
                expert_E = plan.layer(layer).expert_E
                assert expert_E is not None
                copies_E = torch.from_numpy(np.bincount(expert_E)[expert_E].astype(np.float32))
                value = values[parameter]
                if matched.expert is not None:
                    value.div_(copies_E[experts[matched.expert]] ** power)
                else:
                    value.div_(copies_E[:, None] ** power)


def _by_expert(matched: Match) -> bool:
    return matched.expert is not None or matched.row.role == "router"
