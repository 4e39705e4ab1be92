"""Continue pre-training: steps, validation, adaptive mixtures, saves, and recovery."""

from __future__ import annotations

import gc
from functools import partial

from megatron_moe.checkpoint.local import LocalCopies
from megatron_moe.checkpoint.policy import roll_back, save_or_continue, step_message
from megatron_moe.checkpoint.revive import revive
from megatron_moe.checkpoint.sharded import Saver
from megatron_moe.commands.job import Job
from megatron_moe.commands.stages import enter_next_stage, stage_message
from megatron_moe.commands.teaching import Teaching
from megatron_moe.config.run import RunConfig
from megatron_moe.data.feed import DataRank, Feed
from megatron_moe.data.mixing import adapted_weights, updates_due
from megatron_moe.data.texts import Texts
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.log import StepProgress
from megatron_moe.planner.flops import SequenceFlops, sequence_flops
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.teacher import teacher_flops, teacher_work
from megatron_moe.runtime.wait import waiter
from megatron_moe.train.device_check import DeviceCheck
from megatron_moe.train.garbage import INTERVAL, manual_collection
from megatron_moe.train.guard import Boundary, StepGuard
from megatron_moe.train.health import RouterHealth
from megatron_moe.train.loop import Hook, Numbers, run_loop
from megatron_moe.train.metrics import (
    MetricsWriter,
    held_out_numbers,
    mixture_numbers,
    step_numbers,
)
from megatron_moe.train.peak import Peak, device_peak
from megatron_moe.train.routing_record import RoutingRecord
from megatron_moe.train.sinks import Sink
from megatron_moe.train.state import TrainState
from megatron_moe.train.step import StepResult, mean_loss, train_step


def feed_of(job: Job, texts: Texts) -> Feed:
    """Return the source of this rank's batches."""
    pin = job.world.device.type == "cuda"
    return Feed(texts, job.config, DataRank.of(job.groups), pin=pin)


def continue_pretraining(
    job: Job,
    state: TrainState,
    plan: ExpertPlan,
    feed: Feed,
    sinks: list[Sink],
    copies: LocalCopies | None = None,
) -> bool:
    """Take the remaining steps, run the hooks between them, and return whether none is left."""
    config = job.config
    peak = _announced_peak(job, state)
    resumed_step, writer = state.step, None
    if job.world.rank == 0:
        writer = MetricsWriter(config.run.dir, sinks, resumed_step=resumed_step)
        job.say(writer.remark)
    if resumed_step == 0:
        numbers: Numbers = {"step": 0}
        _validate(job, state, feed, numbers)
        if writer is not None:
            writer.write(numbers)

    teaching, taught = Teaching(job, plan), _taught_flops(job, state.model.spec)
    if state.step < config.train.steps:
        teaching.before_step(state)  # opens it here, so that no step's time includes this
    with (
        Saver(config, plan_hash=plan.hash, say=job.say) as saver,
        StepProgress(total=config.train.steps, done=resumed_step, rank=job.world.rank) as progress,
        manual_collection(),
    ):
        job.say(stage_message(job, state.model.spec, step=resumed_step))
        if config.train.steps == 0:
            _save(job, saver, state, last=True)
        boundary = Boundary(job.signals, job.watch, job.say)
        guard = StepGuard(config.guard)
        check = DeviceCheck(
            feed, job.layout, rank=job.world.rank, device=job.world.device.type, start=resumed_step
        )
        health = _router_health(config, plan)
        routing = RoutingRecord(config, rank=job.world.rank, size=job.world.size)
        while True:
            end = config.train.stage_end(state.step)
            run_loop(
                state,
                steps=end,
                take_step=partial(
                    _take_step, job, state, feed, guard, saver, check, teaching, routing
                ),
                wait=waiter(job.world.device),
                describe=partial(_describe, job, state, feed, peak, health, taught),
                hooks=_hooks(job, saver, state, feed, writer, progress, boundary, copies, end=end),
                keeps=partial(_keeps, job, state, saver, writer, plan.hash),
                stopping=boundary.stopping,
            )
            if boundary.stopped or state.step >= config.train.steps:
                break
            enter_next_stage(job, state, plan)
    if boundary.stopped:
        job.say(f"Stopped by a signal after step {state.step}. Run the same command to resume.")
    if writer is not None:
        writer.close()
    job.say(f"Run megatron-moe report {config.run.dir} to see the run on one page.")
    return state.step >= config.train.steps


def _announced_peak(job: Job, state: TrainState) -> Peak:
    """Return the peak that MFU is relative to, and log it."""
    peak = device_peak(job.world.device, state.model.transformer.params_dtype)
    tflops = peak.flops_per_second / 1e12
    job.say(
        f"MFU is relative to a peak of {tflops:.3g} TFLOP/s ({peak.source}); it counts the "
        "attention that a causal model needs"
    )
    return peak


def _router_health(config: RunConfig, plan: ExpertPlan) -> RouterHealth:
    return RouterHealth(
        plan.recipe.moe_layers,
        num_experts=plan.recipe.num_experts,
        topk=config.moe.moe_router_topk,
        steps=config.log.router_warning_steps,
        max_load=config.log.router_max_load,
    )


def _hooks(
    job: Job,
    saver: Saver,
    state: TrainState,
    feed: Feed,
    writer: MetricsWriter | None,
    progress: StepProgress,
    boundary: Boundary,
    copies: LocalCopies | None,
    *,
    end: int,
) -> list[Hook]:
    """Return what runs between the steps of a stage that ends at step ``end``."""
    interval = job.config.checkpoint.interval
    local = [] if copies is None else [partial(_save_locally, job, copies, state)]
    return [
        Hook(1, progress.show),
        Hook(INTERVAL, _collect_garbage),
        Hook(interval, partial(_validate, job, state, feed), when_stopped=False),
        Hook(1, partial(_move_mixture, job, state, feed)),
        Hook(1, writer.write if writer is not None else _nothing),
        Hook(interval, writer.sync if writer is not None else _nothing),
        Hook(
            interval,
            lambda numbers: _save(
                job, saver, state, last=boundary.stopped or numbers["step"] == end
            ),
        ),
        *(Hook(job.config.checkpoint.local_interval, save) for save in local),
    ]


def _take_step(
    job: Job,
    state: TrainState,
    feed: Feed,
    guard: StepGuard,
    saver: Saver,
    check: DeviceCheck,
    teaching: Teaching,
    routing: RoutingRecord,
) -> StepResult:
    watch = job.watch

    def at(stage: str) -> None:
        watch.at(stage)
        if stage == "optimizer":
            saver.before_update()

    watch.step = state.step + 1
    watch.at("data")
    batches, after = feed.next_step(state.blend)
    samples = [sample for batch in batches for sample in batch.samples_B.tolist()]
    width = batches[0].labels_BS.shape[1] // job.groups.tp.size()
    routing.start_step(state.model.modules, state.step, samples, width=width)
    teacher = teaching.before_step(state)
    interval = job.config.guard.device_check_interval
    due = interval is not None and (state.step + 1) % interval == 0
    result = train_step(
        state, batches, job.config, job.groups,
        guard=guard, at=at, teacher=teacher, check=check if due else None,
    )  # fmt: skip
    routing.end_step(state.step)
    revive(state, result.revivals, job.groups)
    state.blend = after
    watch.at("report")
    return result


def _keeps(
    job: Job,
    state: TrainState,
    saver: Saver,
    writer: MetricsWriter | None,
    plan_hash: str,
    result: StepResult,
) -> bool:
    """Return whether the step counts. After a loss spike, restore the newest checkpoint if any."""
    if result.decision == "keep":
        return True
    step = state.step
    back = result.decision == "roll back" and roll_back(
        saver, state, job.config, job.groups, plan_hash=plan_hash
    )
    if back and writer is not None:
        writer.roll_back(state.step)
    job.say(step_message(step, result, back_at=state.step if back else None))
    return not back


def _save(job: Job, saver: Saver, state: TrainState, *, last: bool) -> None:
    job.watch.at("save")
    save_or_continue(saver, state, job.config, job.groups, last=last, say=job.say)


def _save_locally(job: Job, copies: LocalCopies, state: TrainState, numbers: Numbers) -> None:
    job.watch.at("save")
    copies.save(state, job.groups)


def _describe(
    job: Job,
    state: TrainState,
    feed: Feed,
    peak: Peak,
    health: RouterHealth,
    taught: SequenceFlops,
    result: StepResult,
    seconds: float,
) -> Numbers:
    for warning in health.after(state.step, result.chosen_LE.numpy()):
        job.say(warning)
    for revival in result.revivals:
        job.say(f"Step {state.step}: {revival}")
    return step_numbers(
        result,
        step=state.step,
        tokens=state.tokens,
        learning_rate=state.learning_rate,
        seconds=seconds,
        data_seconds=feed.seconds,
        flops=_flops(job, state) + taught if result.teacher else _flops(job, state),
        peak_flops=peak.flops_per_second,
        config=job.config,
    )


def _flops(job: Job, state: TrainState) -> SequenceFlops:
    """Return the model's operations in the last step, on one sequence."""
    config = job.config
    shape = run_shape(config, state.model.spec)
    frozen = config.frozen_after(state.step - 1)
    return sequence_flops(shape, config.data.seq_length, frozen)


def _taught_flops(job: Job, spec: ModelSpec) -> SequenceFlops:
    """Return the teacher's operations on one sequence; none without a teacher."""
    config = job.config
    work = teacher_work(config, spec)
    if work is None:
        return SequenceFlops(0, 0)
    return teacher_flops(work, run_shape(config, spec), config.data.seq_length)


def _validate(job: Job, state: TrainState, feed: Feed, numbers: Numbers) -> None:
    """Add the loss on each domain's held-out text to the step's numbers."""
    job.watch.at("validate")
    losses = {
        name: mean_loss(state.wrapped, feed.held_out(name), job.config, state.model, job.groups)
        for name in feed.texts.validation
    }
    if not losses:
        return
    mean = sum(losses.values()) / len(losses)
    numbers["loss/validation"] = mean
    if several := len(feed.texts.training) > 1:
        numbers |= {f"loss/validation/{name}": loss for name, loss in losses.items()}
    if job.world.rank == 0:  # the rank that writes them
        numbers |= held_out_numbers(losses, feed.held_out_sizes, several=several)
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    job.say(
        f"Step {state.step}: loss on held-out text {mean:.4f}" + f" ({each})" * (len(losses) > 1)
    )


def _move_mixture(job: Job, state: TrainState, feed: Feed, numbers: Numbers) -> None:
    """Update the domain weights from their losses when an update is due, and log them."""
    mixing, tokens = job.config.data.mixing, numbers["tokens/seen"]
    before = tokens - numbers["tokens/batch"]
    if mixing.update != "never" and updates_due(before, tokens, interval=mixing.interval):
        if "loss/validation" not in numbers:
            _validate(job, state, feed, numbers)
        references = feed.texts.references
        assert references is not None, "the rules ask for them"
        losses = [numbers[f"loss/validation/{name}"] for name in references]
        weights = adapted_weights(state.blend.weights, losses, list(references.values()), mixing)
        state.blend = state.blend.reweighted(weights)
    chunks = {name: text.num_chunks for name, text in feed.texts.training.items()}
    numbers |= mixture_numbers(state.blend, chunks)


def _collect_garbage(numbers: Numbers) -> None:
    gc.collect()


def _nothing(numbers: Numbers) -> None:
    """Ignore the metrics, on ranks that do not write them."""
