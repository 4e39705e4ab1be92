"""The stories: one function a command, one line a stage. Read this second, after config/run.py."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.checkpoint.dense_source import DistributedDense, open_dense
from megatron_moe.checkpoint.folder import newest
from megatron_moe.checkpoint.policy import go_back, save_or_go_on, told
from megatron_moe.checkpoint.sharded import Saver, restore
from megatron_moe.config.load import dump
from megatron_moe.config.mixtures import starting_weights
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.against_dense import (
    AgainstDense,
    Comparing,
    compare_layers_and_losses,
)
from megatron_moe.construct.complete import complete_plan
from megatron_moe.data.announce import announcement
from megatron_moe.data.feed import Feed, Seat
from megatron_moe.data.mixing import moved, updates_due
from megatron_moe.data.reference import dense_losses, write_reference_losses
from megatron_moe.data.texts import Texts, open_texts
from megatron_moe.data.tokenizer import fingerprint_of
from megatron_moe.device.memory import held_bytes, peak_bytes, reset_peak
from megatron_moe.device.world import World
from megatron_moe.errors import ConfigError
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import DenseCheckpoint, open_mixed
from megatron_moe.hf.spec import read_spec
from megatron_moe.log import StepProgress, console
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.config import DTYPES, check_dispatcher
from megatron_moe.model.overlap import start_tp_overlap
from megatron_moe.model.receipt import gather_receipt, rank_receipt, write_receipt
from megatron_moe.model.router import set_output_scales
from megatron_moe.model.upcycle import check_coverage, upcycle
from megatron_moe.model.verify import Agreement, compare_with_dense, verify_length
from megatron_moe.parallel.groups import create_groups
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.plan.flops import forward_flops, training_flops
from megatron_moe.plan.shape import upcycled_shape
from megatron_moe.train.guard import Boundary, Judge, Signals
from megatron_moe.train.lock import only_job
from megatron_moe.train.loop import Hook, Numbers, run_loop
from megatron_moe.train.metrics import MetricsWriter, mixture_numbers, step_numbers
from megatron_moe.train.peak import Peak, device_peak
from megatron_moe.train.state import TrainState, make_state
from megatron_moe.train.step import StepResult, mean_loss, train_step
from megatron_moe.train.watch import Observe, Watch, unobserved

VERIFY_UP_TO_PARAMETERS = 1_000_000_000
EXPERT_KERNEL = {"cpu": "a loop of matrix products", "cuda": "TEGroupedMLP"}


@dataclass(frozen=True, slots=True)
class Job:
    """What every stage after the process groups needs to know."""

    config: RunConfig
    world: World
    layout: ParallelLayout
    groups: ProcessGroupCollection
    watch: Watch
    signals: Signals

    def say(self, text: str) -> None:
        """Tell the operator, once."""
        if self.world.rank == 0:
            console.print(text)


def train(config: RunConfig, world: World, observe: Observe = unobserved) -> None:
    """Turn the dense checkpoint into a Mixture-of-Experts and continue its pre-training.

    Runs on every rank; `legality.check` has passed the configuration. A run that has a checkpoint
    goes on from its newest one and takes nothing from the dense weights. SIGTERM and SIGUSR1 save
    and return after the step that is being taken; a rank that is lost ends the others.

    Args:
        config: The run.
        world: This rank's place in the joined job.
        observe: Called with the stage and the step whenever this rank enters a stage.
    """
    check_dispatcher(config.moe, cuda=world.device.type == "cuda")
    with (
        Signals() as signals,
        only_job(config.run.dir),
        Watch(world, hang_seconds=config.guard.hang_seconds, observe=observe) as watch,
    ):
        layout, groups = create_groups(config.parallel, seed=config.run.seed)  # who holds what
        _train(Job(config, world, layout, groups, watch, signals))


def _train(job: Job) -> None:
    config, world, groups = job.config, job.world, job.groups
    cuda = world.device.type == "cuda"
    job.watch.at("load")
    dense = open_dense(config.dense.path)  # 1. read
    if cuda:
        start_tp_overlap(config, dense.spec)
    dense.check_tensors(dict(dense_tensors(dense.spec)))
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    plan = complete_plan(plan, config, dense)  # 2. which neurons go where
    texts = open_texts(config, vocab_size=dense.spec.vocab_size)  # 3. data
    _announce(job, dense, plan)

    resume_from = newest(config.run.dir)
    if resume_from is None:
        model = upcycled_model(job, dense, plan, texts, cuda=cuda)  # 4. filled online, verified
        state = make_state(config, model, groups, cuda=cuda)
    else:
        model = empty_model(job, dense, plan, cuda=cuda)
        state = make_state(config, model, groups, cuda=cuda)
        restore(state, resume_from, config, groups, plan_hash=plan.hash)
        job.say(f"resumed {resume_from} at step {state.step}")
        _take_configured_weights(job, state)

    job.say(announcement(texts, state.blend, config))
    _continue_pretraining(job, state, plan, _feed(job, texts))  # 5. train, validate, save


def reference_loss(config: RunConfig, world: World, out: Path) -> None:
    """Write the dense model's loss on each domain: what a mixture that moves is measured against.

    Runs on one rank; the model must fit there whole.
    """
    spec = read_spec(config.dense.path)
    texts = open_texts(config, vocab_size=spec.vocab_size)
    if without := [name for name in texts.training if name not in texts.validation]:
        raise ConfigError(
            f"no held-out text of {', '.join(without)} to evaluate the dense model on.\n"
            "  set data.validation_fraction, or a validation_path for each"
        )
    for line in texts.remarks:
        console.print(line)
    losses = dense_losses(
        config.dense.path,
        texts.validation,
        num_samples=config.data.validation_samples,
        reset_attention=config.data.reset_attention,
        device=world.device,
        dtype=DTYPES[config.train.precision],
    )
    write_reference_losses(
        out,
        losses,
        dense=str(config.dense.path),
        tokenizer=fingerprint_of(config.dense.path),
        seq_length=config.data.seq_length,
        validation_samples=config.data.validation_samples,
    )
    console.print("\n".join(f"{name}: {loss:.4f} nats per token" for name, loss in losses.items()))


def upcycled_model(
    job: Job, dense: DenseCheckpoint, plan: ExpertPlan, texts: Texts, *, cuda: bool
) -> Model:
    """Build the model, fill it from the dense checkpoint, verify it, and write the receipt."""
    config, rank = job.config, job.world.rank
    reset_peak()
    held, start = held_bytes(), time.perf_counter()
    model = empty_model(job, dense, plan, cuda=cuda)
    mix_with = open_mixed(dense, config.upcycle.mix_with)
    filled = upcycle(model, dense, plan, layout=job.layout, rank=rank, mix_with=mix_with)
    mine = rank_receipt(
        filled,
        held_bytes_before=held,
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - start,
    )
    tensors_used = check_coverage(filled, dense, num_sources=plan.recipe.num_sources)
    agreement, against_dense = None, None
    if _wants_verification(config, dense):
        if isinstance(dense, DistributedDense):
            job.say("no logits to compare: transformers does not load a distributed checkpoint")
        else:
            agreement = _verify(job, model, texts)
        against_dense = _compare(job, model, dense, texts, cuda=cuda)
    receipt = gather_receipt(
        mine,
        tensors_used=tensors_used,
        source_bytes=dense.source_bytes,
        plan_hash=plan.hash,
        method=plan.recipe.method,
        agreement=agreement,
        against_dense=None if against_dense is None else against_dense.to_json(),
    )
    if rank == 0:
        write_receipt(receipt, config.run.dir)
    job.say(
        f"upcycled {tensors_used} tensors in {receipt['seconds']:.1f} s; rank 0 read "
        f"{mine.bytes_read / 2**20:.1f} MiB for its {mine.parameter_bytes / 2**20:.1f} MiB shard"
    )
    return model


def empty_model(job: Job, dense: DenseCheckpoint, plan: ExpertPlan, *, cuda: bool) -> Model:
    """This rank's part of the MoE, without values; its routers know the plan's scales."""
    model = build_model(
        job.config,
        dense.spec,
        layout=job.layout,
        groups=job.groups,
        rank=job.world.rank,
        cuda=cuda,
    )
    set_output_scales(model.modules, plan)
    return model


def _wants_verification(config: RunConfig, dense: DenseCheckpoint) -> bool:
    if config.upcycle.verify == "auto":
        parameters = sum(math.prod(tensor.shape) for tensor in dense.tensors.values())
        return parameters <= VERIFY_UP_TO_PARAMETERS
    return config.upcycle.verify == "always"


def _verify(job: Job, model: Model, texts: Texts) -> Agreement:
    config = job.config
    length = verify_length(config.data.seq_length, tp=job.groups.tp.size(), cp=job.groups.cp.size())
    tokens_S = torch.from_numpy(texts.first_sample().ids_T[:length].copy())
    agreement = compare_with_dense(model, config.dense.path, tokens_S, groups=job.groups)
    job.say(
        f"against the dense model on {agreement.tokens} tokens of text: max logit error "
        f"{agreement.max_logit_error:.2e}, same next token at {agreement.argmax_agreement:.1%}"
    )
    return agreement


def _compare(
    job: Job, model: Model, dense: DenseCheckpoint, texts: Texts, *, cuda: bool
) -> AgainstDense:
    comparing = Comparing(
        config=job.config, dense=dense, layout=job.layout, groups=job.groups,
        rank=job.world.rank, cuda=cuda,
    )  # fmt: skip
    found = compare_layers_and_losses(comparing, model, texts)
    job.say(str(found))
    return found


def _feed(job: Job, texts: Texts) -> Feed:
    dp, cp = job.groups.dp, job.groups.cp
    seat = Seat(dp_rank=dp.rank(), dp_size=dp.size(), cp_rank=cp.rank(), cp_size=cp.size())
    return Feed(texts, job.config, seat)


def _continue_pretraining(job: Job, state: TrainState, plan: ExpertPlan, feed: Feed) -> None:
    config = job.config
    peak = device_peak(job.world.device, state.model.transformer.params_dtype)
    job.say(f"MFU is of {peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})")
    writer = MetricsWriter(config, resumed_step=state.step) if job.world.rank == 0 else None
    resumed_step = state.step
    if resumed_step == 0:
        numbers: Numbers = {"step": 0}
        _validate(job, state, feed, numbers)
        if writer is not None:
            writer.write(numbers)

    with (
        Saver(config, plan_hash=plan.hash, say=job.say) as saver,
        StepProgress(total=config.train.steps, done=resumed_step, rank=job.world.rank) as progress,
    ):
        if config.train.steps == 0:
            _save(job, saver, state, last=True)
        boundary = Boundary(job.signals, job.watch, job.say)
        run_loop(
            state,
            steps=config.train.steps,
            take_step=partial(_take_step, job, state, feed, Judge(config.guard)),
            describe=partial(_describe, job, state, feed, peak),
            hooks=[
                Hook(1, progress.show),
                Hook(
                    config.checkpoint.interval,
                    partial(_validate, job, state, feed),
                    when_stopped=False,
                ),
                Hook(1, partial(_move_mixture, job, state, feed)),
                Hook(1, writer.write if writer is not None else _nothing),
                Hook(
                    config.checkpoint.interval,
                    lambda numbers: _save(
                        job,
                        saver,
                        state,
                        last=boundary.stopped or numbers["step"] == config.train.steps,
                    ),
                ),
            ],
            keeps=partial(_keeps, job, state, saver, writer, plan.hash),
            stopping=boundary.stopping,
        )
    if boundary.stopped:
        job.say(f"stopped by a signal after step {state.step}; the same command goes on from there")
    if writer is not None:
        writer.close()


def _take_configured_weights(job: Job, state: TrainState) -> None:
    """A checkpoint brings weights; those that do not move are what the configuration says now."""
    weights = starting_weights(job.config.data)
    if job.config.data.mixing.update == "never" and weights != state.blend.by_domain:
        job.say(f"domains are drawn by new weights from here on; before: {state.blend.by_domain}")
        state.blend = state.blend.reweighted(tuple(weights.values()))


def _take_step(job: Job, state: TrainState, feed: Feed, judge: Judge) -> StepResult:
    watch = job.watch
    watch.step = state.step + 1
    watch.at("data")
    batches, after = feed.next_step(state.blend)
    result = train_step(state, batches, job.config, job.groups, judge=judge, at=watch.at)
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
    """Whether the step stays; after a loss spike the run goes back, where it can."""
    if result.fate == "keep":
        return True
    step = state.step
    back = result.fate == "roll back" and go_back(
        saver, state, job.config, job.groups, plan_hash=plan_hash
    )
    if back and writer is not None:
        writer.go_back(state.step)
    job.say(told(step, result, back_at=state.step if back else None))
    return not back


def _save(job: Job, saver: Saver, state: TrainState, *, last: bool) -> None:
    job.watch.at("save")
    save_or_go_on(saver, state, job.config, job.groups, last=last, say=job.say)


def _describe(
    job: Job, state: TrainState, feed: Feed, peak: Peak, result: StepResult, seconds: float
) -> Numbers:
    shape = upcycled_shape(state.model.spec, job.config.moe)
    forward = forward_flops(shape, sequence_length=job.config.data.seq_length).model
    return step_numbers(
        result,
        step=state.step,
        samples=state.samples,
        learning_rate=state.learning_rate,
        seconds=seconds,
        data_seconds=feed.seconds,
        flops_per_sequence=training_flops(forward),
        peak_flops=peak.flops_per_second,
        config=job.config,
    )


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
    if len(feed.texts.training) > 1:
        numbers |= {f"loss/validation/{name}": loss for name, loss in losses.items()}
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    job.say(
        f"step {state.step}: loss on held-out text {mean:.4f}" + f" ({each})" * (len(losses) > 1)
    )


def _move_mixture(job: Job, state: TrainState, feed: Feed, numbers: Numbers) -> None:
    """Where it is time, weigh the domains anew by their losses; and tell their weights."""
    mixing, tokens = job.config.data.mixing, numbers["tokens/seen"]
    before = tokens - job.config.train.global_batch_size * job.config.data.seq_length
    if mixing.update != "never" and updates_due(before, tokens, interval=mixing.interval):
        if "loss/validation" not in numbers:
            _validate(job, state, feed, numbers)
        references = feed.texts.references
        assert references is not None, "legality asks for them"
        losses = [numbers[f"loss/validation/{name}"] for name in references]
        weights = moved(state.blend.weights, losses, list(references.values()), mixing)
        state.blend = state.blend.reweighted(weights)
    chunks = {name: text.num_chunks for name, text in feed.texts.training.items()}
    numbers |= mixture_numbers(state.blend, chunks)


def _nothing(numbers: Numbers) -> None:
    """What ranks that write no metrics do with them."""


def _announce(job: Job, dense: DenseCheckpoint, plan: ExpertPlan) -> None:
    """The resolved layout and plan, in the log and in run.dir/config.yaml."""
    if job.world.rank == 0:
        (job.config.run.dir / "config.yaml").write_text(dump(job.config))
    attention = " x ".join(f"{a}{n}" for a, n in _grid(job.layout.attention))
    experts = " x ".join(f"{a}{n}" for a, n in _grid(job.layout.experts))
    job.say(
        f"{job.world.size} ranks on {job.world.device.type}: attention {attention}, "
        f"experts {experts} ({EXPERT_KERNEL[job.world.device.type]})\n"
        f"{dense.spec.family} with {dense.spec.num_layers} layers, "
        f"{len(plan.recipe.moe_layers)} of them {plan.recipe.num_experts} experts by "
        f"{plan.recipe.method!r}; plan {plan.hash[:12]}"
    )


def _grid(grid: Any) -> list[tuple[str, int]]:
    return list(zip(grid.axes, grid.shape, strict=True))
