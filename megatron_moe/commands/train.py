"""The story of ``train``: one line per stage. Read this second, after config/run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.folder import (
    complete,
    keep_plan,
    keep_source_files,
    plan_of,
    read_config,
    read_progress,
    source_copy,
)
from megatron_moe.checkpoint.local import LocalCopies
from megatron_moe.checkpoint.visible import agreed_newest
from megatron_moe.commands.job import Job
from megatron_moe.commands.optimizer_state import open_optimizer_state, take_optimizer_state
from megatron_moe.commands.pretraining import continue_pretraining, feed_of
from megatron_moe.commands.resuming import (
    Change,
    change_table,
    changed_settings,
    changed_texts,
    record_changes,
)
from megatron_moe.commands.stages import restored_state
from megatron_moe.commands.upcycling import upcycled_model
from megatron_moe.config.load import dump
from megatron_moe.config.mixtures import starting_weights
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import complete_plan
from megatron_moe.data.announce import announcement
from megatron_moe.data.texts import open_texts
from megatron_moe.data.tokenizer import check_same_vocabulary
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.log import console
from megatron_moe.model.config import check_dispatcher, check_engine
from megatron_moe.model.grouped_experts import kernel_in
from megatron_moe.model.overlap import start_tp_overlap
from megatron_moe.parallel.groups import create_groups
from megatron_moe.planner.memory import peak_memory
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.teacher import with_teacher
from megatron_moe.planner.workload import degrees_of, workload_of
from megatron_moe.rules.installed import require_packages
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.world import World
from megatron_moe.source.open import open_source
from megatron_moe.train.guard import Signals
from megatron_moe.train.lock import only_job
from megatron_moe.train.sinks import Sink, open_sinks
from megatron_moe.train.state import TrainState, make_state
from megatron_moe.train.watch import Observe, Watch, unobserved


def train(config: RunConfig, world: World, observe: Observe = unobserved) -> bool:
    """Turn the dense checkpoint into a Mixture-of-Experts and continue its pre-training.

    Runs on every rank; `rules.check` has passed the configuration. A run that has a checkpoint
    goes on from its newest one and takes nothing from the dense weights. SIGTERM and SIGUSR1 save
    and return after the step that is being taken; a rank that is lost ends the others.

    Args:
        config: The run.
        world: This rank's place in the joined job.
        observe: Called with the stage and the step whenever this rank enters a stage.

    Returns:
        Whether all steps are taken; if not, a signal has stopped the run.
    """
    require_packages(config)
    engine = engine_of(config.run.engine, world)
    check_engine(config, engine)
    check_dispatcher(config.moe, engine)
    with (
        Signals() as signals,
        only_job(config.run.dir),
        Watch(world, hang_seconds=config.guard.hang_seconds, observe=observe) as watch,
        open_sinks(config, rank=world.rank, say=console.print) as sinks,
    ):
        layout, groups = create_groups(config.parallel, seed=config.run.seed)  # who holds what
        return _train(Job(config, world, engine, layout, groups, watch, signals), sinks)


def _train(job: Job, sinks: list[Sink]) -> bool:
    config, groups = job.config, job.groups
    job.watch.at("load")
    resume_from = agreed_newest(config.run.dir, job.world)
    if resume_from is None and (unused := complete(config.run.dir)):
        job.say(
            f"There is no {config.run.dir}/checkpoints/latest, so this run starts at step 0. It "
            f"replaces the checkpoints {', '.join(one.name for one in unused)} when it reaches "
            "their steps; to resume, stop it and write the name of one into that file."
        )
    before = None if resume_from is None else read_config(resume_from)
    changes: list[Change] = []
    if before is not None and resume_from is not None:
        changes = changed_settings(before, config, step=read_progress(resume_from).step)
    # If the source is gone, all ranks read the run's copy, which must not be replaced meanwhile.
    if job.world.rank == 0 and config.source.path != config.run.dir / "source":
        kept = config.source.path if resume_from is None else source_copy(resume_from)
        keep_source_files(config.run.dir, kept)
    if job.world.rank == 0 and resume_from is not None:
        job.say(keep_plan(config.run.dir, resume_from))
    dense, spec, plan = _source(job, resume_from)  # 1. read, 2. which neurons each expert takes
    if job.world.device.type == "cpu":
        job.watch.predicted_memory = _predicted_memory(config, spec, job.world.size)
    texts = open_texts(  # 3. data
        config, vocab_size=spec.vocab_size, on_progress=lambda: job.watch.at("load")
    )
    if job.world.rank == 0:
        changes += changed_texts(config.run.dir, texts.fingerprints())
    _announce(job, spec, plan)

    copies = None
    if config.checkpoint.local_dir is not None:
        copies = LocalCopies(config, plan_hash=plan.hash, say=job.say)
    if dense is not None:
        folder, inherited = config.source.optimizer_state, None
        if folder is not None:
            inherited = open_optimizer_state(folder, dense)
        # 4. filled online, verified; no other reference to the model, which a stage may replace
        state = make_state(config, upcycled_model(job, dense, plan, texts), groups)
        if inherited is not None:
            take_optimizer_state(job, state, inherited, plan)
    else:
        assert resume_from is not None
        local = None if copies is None else copies.find(resume_from)
        state = restored_state(job, spec, plan, resume_from, local)
        _report_resume(job, state, "local copies" if local else resume_from, changes)
        _take_configured_weights(job, state)

    if (kernel := kernel_in(state.model.modules)) is not None:
        job.say(f"Experts use {kernel.name} ({kernel.reason})")
    job.say(announcement(texts, state.blend, config))
    # 5. train, validate, save
    return continue_pretraining(job, state, plan, feed_of(job, texts), sinks, copies)


def _source(
    job: Job, resume_from: Path | None
) -> tuple[SourceCheckpoint | None, ModelSpec, ExpertPlan]:
    """Return the source, its shape, and the complete plan; a resume opens no source.

    What a resume needs of the source is in the checkpoint, so the source may be gone by then.
    """
    config = job.config
    dense = open_source(config.source.path) if resume_from is None else None
    spec = read_spec(config.source.path) if dense is None else dense.spec
    if not job.engine.is_torch:
        start_tp_overlap(config, spec)
    if dense is None:
        assert resume_from is not None
        return None, spec, plan_of(resume_from, spec, config)
    check_same_vocabulary(config.source.path, config.upcycle.mix_with)
    dense.check_tensors(dict(dense_tensors(spec)))
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    return dense, spec, complete_plan(plan, config, dense)


def _predicted_memory(config: RunConfig, spec: ModelSpec, world_size: int) -> str:
    """Return what `plan` predicts for a rank, in words, without what it adds for CUDA."""
    work = with_teacher(workload_of(config), config, spec)
    shape, degrees = run_shape(config, spec), degrees_of(config, gpus=world_size)
    memory = peak_memory(shape, work, degrees)
    gib = memory.total - memory.framework - memory.communication
    return (
        f"plan predicts {1024 * gib:.0f} MiB for the model, its optimizer and activations on a "
        "rank of this layout; Python and its libraries need some hundred more"
    )


def _report_resume(job: Job, state: TrainState, resumed: Path | str, changes: list[Change]) -> None:
    """Log where the run resumes, and what is different from the checkpoint."""
    job.say(f"Resumed {resumed} at step {state.step}")
    job.say(change_table(changes, step=state.step))
    if job.world.rank == 0:
        record_changes(job.config.run.dir, changes, step=state.step)
    if state.step >= job.config.train.steps:
        job.say(
            f"This run is finished: it has taken all {job.config.train.steps} steps (train.steps)."
        )


def _take_configured_weights(job: Job, state: TrainState) -> None:
    """Replace the checkpoint's domain weights by the configured ones, unless they adapt."""
    weights = starting_weights(job.config.data)
    if job.config.data.mixing.update == "never" and weights != state.blend.by_domain:
        job.say(f"Domain weights changed on resume. Previous weights: {state.blend.by_domain}")
        state.blend = state.blend.reweighted(tuple(weights.values()))


def _announce(job: Job, spec: ModelSpec, plan: ExpertPlan) -> None:
    """Log the layout, engine and plan, and write run.dir/config.yaml."""
    if job.world.rank == 0:
        write_text(job.config.run.dir / "config.yaml", dump(job.config))
    attention = " x ".join(f"{a}{n}" for a, n in _grid(job.layout.attention))
    experts = " x ".join(f"{a}{n}" for a, n in _grid(job.layout.experts))
    job.say(
        f"{job.world.size} ranks on {job.world.device.type}: attention {attention}, "
        f"experts {experts}\n"
        f"Engine: {job.engine.name} ({job.engine.reason})\n"
        f"{spec.family} with {spec.num_layers} layers, "
        f"{len(plan.recipe.moe_layers)} of them with {plan.recipe.num_experts} experts "
        f"(method {plan.recipe.method}, plan {plan.hash[:12]})"
    )


def _grid(grid: Any) -> list[tuple[str, int]]:
    return list(zip(grid.axes, grid.shape, strict=True))
