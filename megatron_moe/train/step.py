"""Take one optimizer step, or one evaluation pass, with Megatron-Core's schedules.

Shape letters of this module:

    B  micro_batch_size   S  sequence length on this cp rank   L  layers   E  num_moe_experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batches import Batch
from megatron_moe.model.build import Model
from megatron_moe.model.loss import make_output_processor
from megatron_moe.model.routers import expert_biases, routers_in
from megatron_moe.train.balancing import Coefficients, adapted, set_coefficients
from megatron_moe.train.device_check import DeviceCheck
from megatron_moe.train.guard import Decision, StepGuard
from megatron_moe.train.inputs import model_inputs, on_device
from megatron_moe.train.optimizers import clip_and_step
from megatron_moe.train.revival import Revival, due_revivals, unused_after
from megatron_moe.train.state import TrainState
from megatron_moe.train.teacher import Lesson, Teacher

Mark = Callable[[str], None]
"""Called when a stage of a step begins, with its name (see ``STAGES`` in train/verdict.py)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Numbers of one step, the same on every rank and under every layout."""

    lm_loss: float
    """Cross entropy, nats per token, over the tokens of the global batch."""
    load_balancing_loss: float
    """Loss of the configured type before its coefficient, mean over MoE layers; 1 is perfect
    balance. With the global-batch type, or none, it is computed over the global batch."""
    router_z_loss: float
    """Mean over tokens and MoE layers of the squared log-sum-exp of the router's logits, before its
    coefficient; 0 if the coefficient is not set."""
    grad_norm: float
    sequences: int
    """Sequences of the global batch."""
    chosen_LE: Tensor
    """Tokens that chose each expert, before any were dropped, by MoE layer."""
    kept_L: Tensor
    """Choices that the capacity limit did not drop."""
    entropy_L: Tensor
    """Mean over tokens of the entropy of the router's softmax over all experts, nats."""
    teacher: dict[str, float] = field(default_factory=dict)
    """Losses that the teacher adds, before their weights; see `Teacher.losses`."""
    decision: Decision = "keep"
    """Whether the weights were updated."""
    balance: Coefficients | None = None
    """Coefficients of the load-balancing losses, if they adapt."""
    revivals: Sequence[Revival] = ()
    """Dead experts that are re-created after the step."""


def train_step(
    state: TrainState,
    batches: list[Batch],
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    guard: StepGuard,
    at: Mark,
    teacher: Teacher | None = None,
    check: DeviceCheck | None = None,
) -> StepResult:
    """Run forward and backward passes over this rank's micro-batches, then update the weights.

    ``guard`` may reject the update; the schedule and the position in the data advance anyway.
    ``check`` computes the step twice. The caller re-creates the experts of ``StepResult.revivals``.
    """
    sequences = len(batches) * config.train.micro_batch_size * groups.dp.size()
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    _weigh_tokens(state.model, batches, groups)
    balance = state.balance
    if balance is not None:
        set_coefficients(state.model.modules, balance)
    biases = expert_biases(state.model.modules) if config.moe.moe_router_enable_expert_bias else ()
    if teacher is not None:
        at("forward")
        teacher.start_step(state.model, step=state.step, sequences=sequences)

    def run(some: list[Batch]) -> list[Tensor]:
        return run_schedule(
            state.wrapped, some, config, state.model, groups, forward_only=False, at=at,
            lessons=None if teacher is None else teacher.lessons(some),
        )  # fmt: skip

    losses = run(batches) if check is None else check.run(state, run, batches)
    at("optimizer")
    optimizer: Any = state.optimizer
    # This comes before the gradient norm, whose value the host waits for: the device runs these
    # kernels meanwhile, and the totals are ready when the host reads them.
    totals = _total_over_ranks(state.model, losses, len(batches))
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    result = _result(totals, state.model, grad_norm, groups, sequences=sequences)
    decision = guard(step=state.step + 1, loss=result.lm_loss, grad_norm=grad_norm)
    if decision == "keep":
        clip_and_step(optimizer, grad_norm)
        if balance is not None:
            state.balance = adapted(balance, result.chosen_LE, result.kept_L, config.moe)
        if state.unused_steps is not None:
            chosen_LE, moe = result.chosen_LE, config.moe
            state.unused_steps = unused_after(state.unused_steps, chosen_LE, moe)
            result = replace(result, revivals=due_revivals(state.unused_steps, chosen_LE, moe))
    else:
        for bias_E, before_E in biases:
            bias_E.copy_(before_E)
    state.schedule.step(increment=1)
    state.step += 1
    state.samples += result.sequences
    state.tokens += result.sequences * config.data.seq_length
    taught = {} if teacher is None else teacher.losses(counted=int(totals[1]))
    return replace(result, decision=decision, teacher=taught, balance=balance)


def _weigh_tokens(model: Model, batches: list[Batch], groups: ProcessGroupCollection) -> None:
    """Set the loss scale to 1 / tokens of the global batch, so that the mean is differentiated.

    Megatron-Core would instead divide all gradients at the end, in an extra pass over them.
    """
    tokens = torch.stack([batch.loss_mask_BS.sum() for batch in batches]).sum()
    tokens = tokens.to(model.device, torch.int32)
    dist.all_reduce(tokens, group=groups.dp_cp)
    mean_over = tokens.clamp(min=1)
    model.transformer.grad_scale_func = lambda loss: loss / mean_over


@torch.no_grad()
def mean_loss(
    modules: list[Any],
    batches: list[Batch],
    config: RunConfig,
    model: Model,
    groups: ProcessGroupCollection,
) -> float:
    """Return the cross entropy in nats per token over the batches of all ranks; nothing changes."""
    if len(modules) > 1:  # the interleaved schedule runs micro-batches in rounds of pp
        empty = replace(batches[-1], loss_mask_BS=torch.zeros_like(batches[-1].loss_mask_BS))
        batches = [*batches, *[empty] * (-len(batches) % groups.pp.size())]
    for module in modules:
        module.eval()
    losses = run_schedule(modules, batches, config, model, groups, forward_only=True)
    for module in modules:
        module.train()
    total = _sum_losses(losses, model)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def run_schedule(
    modules: list[Any],
    batches: list[Batch],
    config: RunConfig,
    model: Model,
    groups: ProcessGroupCollection,
    *,
    forward_only: bool,
    at: Mark | None = None,
    lessons: list[Lesson] | None = None,
) -> list[Tensor]:
    """Run the micro-batches through the pipeline.

    ``lessons`` has the teacher's hidden states of each micro-batch, if there is a teacher of logits
    and this is the last stage.

    Returns:
        On the last stage, the sum of losses and the number of tokens of each micro-batch on this dp
        and cp rank; an empty list on other stages.
    """
    process = make_output_processor(vocab_size=model.spec.vocab_size, tp_group=groups.tp)
    work = list(zip(batches, lessons or [None] * len(batches), strict=True))
    iterators = [iter(work) for _ in modules]  # each chunk of a pipeline rank sees all of them
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, process, model, config, at or _ignore_stage),
        data_iterator=iterators if len(modules) > 1 else iterators[0],
        model=modules if len(modules) > 1 else modules[0],
        num_microbatches=len(batches),
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )


def _ignore_stage(stage: str) -> None:
    """Do nothing: the default for callers that do not track stages."""


def _forward_step(
    process: Any,
    model: Model,
    config: RunConfig,
    at: Mark,
    work: Iterator[tuple[Batch, Lesson | None]],
    module: Any,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """Run a forward pass; or, for a schedule that runs it piece by piece, return a plan of it."""
    at("forward")
    batch, lesson = next(work)
    batch = on_device(batch, model)
    for router in routers_in(module):
        router.start_pass(batch.samples_B)
    run = module.build_schedule_plan if return_schedule_plan else module
    output = run(
        **model_inputs(batch, config.data, model),
        labels=batch.labels_BS,
        output_processor=process if lesson is None else lesson.process,
    )
    loss = partial(_loss if lesson is None else lesson.loss, batch.loss_mask_BS)
    if return_schedule_plan:
        return output, partial(_loss_of_plan, at, loss)
    _mark_backward(output, at)
    return output, loss


def _mark_backward(output: Tensor, at: Mark) -> None:
    if output.requires_grad:  # called when the gradient of the output is ready
        output.register_hook(lambda _: at("backward"))


def _loss_of_plan(at: Mark, loss: Callable[[Tensor], Any], losses: Tensor) -> Any:
    """Return the loss of a pass that was planned, whose output exists only now."""
    _mark_backward(losses, at)
    return loss(losses)


def _loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of losses to differentiate, its number of tokens, and both for the metrics.

    `_weigh_tokens` divides by the tokens of the global batch, so a step does not depend on how the
    batch is split into micro-batches and over dp and cp ranks.
    """
    total = (losses_BS.float() * loss_mask_BS).sum()
    tokens = loss_mask_BS.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens])


def _sum_losses(losses: list[Tensor], model: Model) -> Tensor:
    """Return this rank's sums of losses and tokens, ``(2,)``; zero if another rank counts them."""
    if not losses or model.tp_rank:
        return torch.zeros(2, dtype=torch.float64, device=model.device)
    return torch.stack(losses).double().sum(dim=0)


def _total_over_ranks(model: Model, losses: list[Tensor], num_micro_batches: int) -> Tensor:
    """Sum the ranks' numbers of a step in one collective, ``(2 + 4 L + 2 L E,)``, on the device.

    The last stage holds the losses, and each stage the numbers of its layers. Tokens are split over
    dp, cp and, with sequence parallelism, tp. So every number is a plain sum over all ranks.
    """
    num_layers, num_experts = _moe_shape(model)
    zeros_4E = torch.zeros(4, num_experts, dtype=torch.float64, device=model.device)
    counts_L4E = [zeros_4E] * num_layers
    for router in routers_in(*(chunk.module for chunk in model.chunks)):
        counts_L4E[router.layer] = router.take_counts()
    tracked_2L = _tracked_losses(num_layers, model.device) / num_micro_batches
    wide_L2E, narrow_L2E = torch.stack(counts_L4E).split(2, dim=1)
    numbers = [tracked_2L, narrow_L2E.sum(dim=2), wide_L2E]
    totals = torch.cat([_sum_losses(losses, model), *(x.flatten() for x in numbers)])
    dist.all_reduce(totals)
    return totals


def _result(
    totals: Tensor,
    model: Model,
    grad_norm: float,
    groups: ProcessGroupCollection,
    *,
    sequences: int,
) -> StepResult:
    """Compute the step's numbers from the totals, which are copied to the host in one transfer."""
    num_layers, num_experts = _moe_shape(model)
    sizes = [2, 2 * num_layers, 2 * num_layers, 2 * num_layers * num_experts]
    loss_and_tokens, tracked, narrow, wide = totals.cpu().split(sizes)
    balance_L, z_L = tracked.view(2, num_layers)
    logs_L, kept_L = narrow.view(num_layers, 2).unbind(dim=1)
    chosen_LE, scores_LE = wide.view(num_layers, 2, num_experts).unbind(dim=1)
    moe = chosen_LE.sum(dim=1) > 0
    tokens_L = chosen_LE[moe].sum(dim=1) / model.transformer.moe_router_topk
    if not balance_L.any():  # not tracked per micro-batch: use the global batch
        share_LE = chosen_LE[moe] / chosen_LE[moe].sum(dim=1, keepdim=True)
        mean_LE = scores_LE[moe] / tokens_L[:, None]
        balance = float((share_LE * mean_LE).sum(dim=1).mean()) * num_experts
    else:
        balance = float(balance_L[moe].mean()) / groups.dp.size()
    return StepResult(
        lm_loss=float(loss_and_tokens[0] / loss_and_tokens[1]),
        load_balancing_loss=balance,
        router_z_loss=float(z_L[moe].mean()) / groups.tp_dp_cp.size(),
        grad_norm=grad_norm,
        sequences=sequences,
        chosen_LE=chosen_LE[moe],
        kept_L=kept_L[moe],
        entropy_L=-logs_L[moe] / tokens_L,
    )


def _moe_shape(model: Model) -> tuple[int, int]:
    """Return L and E of the whole model."""
    assert model.transformer.num_moe_experts is not None
    return model.spec.num_layers, model.transformer.num_moe_experts


def _tracked_losses(num_layers: int, device: torch.device) -> Tensor:
    """Return and reset this rank's sums of Megatron-Core's balancing and z-losses, ``(2, L)``.

    The balancing loss of the global batch is omitted: Megatron-Core computes it over the
    micro-batches so far, whose number depends on the layout.
    """
    tracker = get_moe_metrics_tracker()
    sums_2L = torch.zeros(2, num_layers, dtype=torch.float64, device=device)
    for row, names in enumerate([("load_balancing_loss", "seq_load_balancing_loss"), ("z_loss",)]):
        for name in names:
            if (entry := tracker.metrics.get(name)) is not None:
                sums_2L[row] += entry.values.double()
    tracker.clear()
    return sums_2L
