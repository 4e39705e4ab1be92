"""Open the teacher of a run when a step needs it, and drop it after the last step that does."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.commands.job import Job
from megatron_moe.config.run import RunConfig
from megatron_moe.data.tokenizer import check_same_vocabulary
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.from_source import source_config
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.build import build_model
from megatron_moe.model.upcycle import upcycle
from megatron_moe.planner.parameters import total_parameters
from megatron_moe.planner.shape import source_shape
from megatron_moe.source.open import open_source
from megatron_moe.train.garbage import collect_everything
from megatron_moe.train.state import TrainState
from megatron_moe.train.teacher import Teacher


class Teaching:
    """The teacher of a run, while there is one.

    A run that goes back before the last step with a teacher, after a loss spike, opens it again.
    """

    def __init__(self, job: Job, plan: ExpertPlan) -> None:
        """Open nothing yet.

        Args:
            job: The run.
            plan: Construction of the run's experts.
        """
        self._job, self._plan = job, plan
        self._teacher: Teacher | None = None

    def before_step(self, state: TrainState) -> Teacher | None:
        """Return the teacher of the next step; None if the step has none."""
        settings = self._job.config.teacher
        if settings.factor_after(state.step) > 0:
            if self._teacher is None:
                self._job.watch.at("load")
                self._teacher = open_teacher(self._job, self._plan)
        elif self._teacher is not None:
            self._teacher.release()
            self._teacher = None
            collect_everything()
            self._job.say(f"Teacher dropped after step {state.step} (teacher.steps)")
        return self._teacher


def open_teacher(job: Job, plan: ExpertPlan) -> Teacher:
    """Read the teacher into the layout of the run, each rank its own part.

    Raises:
        CheckpointError: The teacher cannot be read.
        DataError: It numbers its tokens differently from the source.
    """
    config = job.config
    folder = config.teacher.path or config.source.path
    try:
        source = open_source(folder)
    except CheckpointError as error:
        raise CheckpointError(_unreadable(config, folder, error)) from error
    if config.teacher.path is not None:
        check_same_vocabulary(config.source.path, [folder])
    source.check_tensors(dict(dense_tensors(source.spec)))
    teacher_config = teacher_run(config, source.spec)
    model = build_model(
        teacher_config, source.spec, layout=job.layout, groups=job.groups, rank=job.world.rank,
        engine=job.engine,
    )  # fmt: skip
    own_plan = make_expert_plan(source.spec, teacher_config.moe, teacher_config.upcycle)
    filled = upcycle(model, source, own_plan, layout=job.layout, rank=job.world.rank)
    parameters = total_parameters(source_shape(source.spec))
    job.say(
        f"Teacher {folder}: {parameters:,} parameters, of which rank 0 holds "
        f"{filled.parameter_bytes / 2**20:.1f} MiB"
    )
    return Teacher(model, config, job.groups, plan)


def _unreadable(config: RunConfig, folder: Path, error: CheckpointError) -> str:
    until = config.teacher.steps or config.train.steps
    return (
        f"the teacher ({folder}) cannot be read, but steps up to {until} need it: {error}\n"
        "  set teacher.path to a folder that has its weights, or remove the section teacher to go "
        "on without one"
    )


def teacher_run(config: RunConfig, spec: ModelSpec) -> RunConfig:
    """Return the configuration of the teacher, with the micro-batches of the run."""
    result = source_config(config, spec)
    train = result.train.model_copy(update={"micro_batch_size": config.train.micro_batch_size})
    return result.model_copy(update={"train": train})
