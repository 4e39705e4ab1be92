"""Restore a training state, and enter the stages of a run, each of which trains other parts.

A stage begins as a resumed run does: from the checkpoint that the stage before it ended with, with
a new model, new gradient buffers and a new optimizer. So an interruption changes nothing, and a
frozen parameter takes no memory beyond its own.
"""

from __future__ import annotations

from pathlib import Path

from megatron_moe.checkpoint.folder import newest, read_progress
from megatron_moe.checkpoint.local import LocalStep
from megatron_moe.checkpoint.sharded import restore
from megatron_moe.commands.job import Job
from megatron_moe.commands.upcycling import empty_model
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.parameters import total_parameters
from megatron_moe.planner.shape import run_shape
from megatron_moe.train.garbage import collect_everything
from megatron_moe.train.state import TrainState, make_state


def restored_state(
    job: Job,
    spec: ModelSpec,
    plan: ExpertPlan,
    checkpoint: Path,
    local: LocalStep | None = None,
) -> TrainState:
    """Build this rank's part of the model and restore it from a checkpoint or from local copies.

    Raises:
        CheckpointError: The checkpoint has another model or precision, or is damaged.
    """
    progress = read_progress(checkpoint) if local is None else local.state.progress
    model = empty_model(job, spec, plan)
    state = make_state(
        job.config, model, job.groups, step=progress.step, updates=progress.updates_by_role
    )
    if local is not None:
        local.restore(state, job.groups)
    else:
        restore(state, checkpoint, job.config, job.groups, plan_hash=plan.hash)
    return state


def enter_next_stage(job: Job, state: TrainState, plan: ExpertPlan) -> None:
    """Replace ``state`` by that of the next stage, after its checkpoint was saved."""
    job.watch.at("load")
    checkpoint = newest(job.config.run.dir)
    assert checkpoint is not None, "the stage before ended with a save"
    spec = state.model.spec
    state.release()
    collect_everything()
    state.replace(restored_state(job, spec, plan, checkpoint))
    job.say(stage_message(job, spec, step=state.step))


def stage_message(job: Job, spec: ModelSpec, *, step: int) -> str:
    """Return what the stage after ``step`` steps trains, for the log; empty if that is all."""
    train = job.config.train
    frozen = job.config.frozen_after(step)
    if not (frozen or train.stages) or step >= train.steps:
        return ""
    shape = run_shape(job.config, spec)
    total = total_parameters(shape)
    trained = total_parameters(shape, frozen=frozen)
    names = ", ".join(frozen.names()) or "nothing"
    return (
        f"Steps {step + 1} to {train.stage_end(step)}: {names} frozen; {trained:,} of {total:,} "
        "parameters are trained"
    )
