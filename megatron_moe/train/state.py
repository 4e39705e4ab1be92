"""Training state: weights, optimizer, schedule and position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_moe.config.mixtures import starting_weights
from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import BlendState, start_blend
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.model.build import Model
from megatron_moe.model.freezing import freeze, parameter_parts
from megatron_moe.runtime.engine import Engine
from megatron_moe.runtime.torch_engine import use_fused_adamw
from megatron_moe.train.balancing import Coefficients
from megatron_moe.train.muon import complete, mark_fused, shards_by_matrix
from megatron_moe.train.optimizers import group_overrides, optimizer_config, store_moments
from megatron_moe.train.revival import UnusedSteps
from megatron_moe.train.schedule import make_schedule


@dataclass(slots=True)
class TrainState:
    """Training state of one rank; all of it is saved and restored together."""

    model: Model
    wrapped: list[DistributedDataParallel]
    """The model's chunks, wrapped for mixed precision and data parallelism."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    blend: BlendState
    """Position in each domain of the data, and the domains' sampling weights."""
    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Sequences consumed: the position in the data, independent of the layout."""
    tokens: int = 0
    """Tokens consumed; sequences may have had several lengths."""
    balance: Coefficients | None = None
    """Coefficients of the next step's load-balancing losses, if they adapt."""
    unused_steps: UnusedSteps | None = None
    """Consecutive steps in which each expert got no tokens, if dead experts are re-created."""

    def gather_weights(self) -> None:
        """Gather updated weights on every dp rank, for code that reads them outside a forward pass.

        With an overlapped gather, the next forward pass gathers them; until then most weights are
        those before the last update.
        """
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def release(self) -> None:
        """Drop the model, its buffers and the optimizer, to free their memory; see `replace`.

        Data parallelism's hooks on gradients refer back to it from C++, where the garbage collector
        sees no cycle, so the cycle is cut here.
        """
        for chunk in self.wrapped:
            chunk.grad_accs.clear()
            del chunk.module
        for name in ("model", "wrapped", "optimizer", "schedule"):
            delattr(self, name)

    def replace(self, other: TrainState) -> None:
        """Become ``other``, so that whoever holds this object continues with it."""
        for field in fields(self):
            setattr(self, field.name, getattr(other, field.name))

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step; the schedule itself has already advanced past it."""
        at_last_step = copy(self.schedule)
        at_last_step.num_steps = max(self.step - 1, 0)
        return float(at_last_step.get_lr({}))


def make_state(
    config: RunConfig,
    model: Model,
    groups: ProcessGroupCollection,
    *,
    step: int = 0,
    updates: Mapping[str, int] | None = None,
) -> TrainState:
    """Wrap a filled model for training.

    The optimizer copies fp32 master weights from the parameters, so the parameters must hold
    their values already (or be restored afterwards, together with the optimizer).

    Args:
        config: The run's configuration.
        model: This rank's part of the model.
        groups: This rank's process groups.
        step: Steps taken so far, which determine the stage and so what is frozen.
        updates: Updates of each part in the checkpoint to restore, if it counts them separately;
            they are then counted on, even if the configuration treats all parts alike.
    """
    transformer, engine = model.transformer, model.engine
    freeze(model, config.frozen_after(step))
    settings = optimizer_config(config, overlap_param_gather=_overlaps_gather(config, engine))
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=settings.use_distributed_optimizer,
        grad_reduce_in_fp32=config.train.grad_reduce_in_fp32,
        overlap_grad_reduce=config.train.overlap_grad_reduce,
        overlap_param_gather=_overlaps_gather(config, engine),
        delay_wgrad_compute=transformer.delay_wgrad_compute,
    )
    wrapped = []
    for index, module in enumerate(model.modules):
        if engine.is_torch and config.train.gradient_accumulation_fusion:
            _add_gradients_in_products(module)
        inner = Float16Module(transformer, module) if transformer.bf16 else module
        wrapped.append(
            DistributedDataParallel(
                transformer, ddp, inner, disable_bucketing=index > 0, pg_collection=groups
            )
        )
    if settings.optimizer == "muon":
        mark_fused(model)
        settings.use_layer_wise_distributed_optimizer &= shards_by_matrix(groups)
    if config.optimizer.stores_moments_apart:
        use_fused_adamw()
    optimizer = get_megatron_optimizer(
        settings,
        wrapped,
        group_overrides(config, settings, parameter_parts(model), updates=updates),
        pg_collection=groups,
        use_gloo_process_groups=False,
    )
    if settings.optimizer == "muon":
        complete(optimizer, settings)
    if config.optimizer.stores_moments_apart:
        store_moments(optimizer, config.optimizer)
    _gather_weights_once(optimizer)
    transformer.finalize_model_grads_func = _finalize
    if ddp.overlap_grad_reduce:  # only during the backward pass of the last micro-batch
        no_sync: Any = [chunk.no_sync for chunk in wrapped]
        transformer.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    blend = start_blend(starting_weights(config.data))
    state = TrainState(model, wrapped, optimizer, make_schedule(config, optimizer), blend)
    layers = moe_layer_ids(config.moe, model.spec.num_layers)
    if config.moe.adaptive_aux_loss:
        state.balance = dict.fromkeys(layers, config.moe.moe_aux_loss_coeff)
    if config.moe.revive_after_steps is not None:
        state.unused_steps = {layer: [0] * config.moe.num_moe_experts for layer in layers}
    return state


def _add_gradients_in_products(module: torch.nn.Module) -> None:
    """Make Megatron-Core's linear layers add gradients to their buffers (runtime/gradients.py).

    This is set here and not in the model's configuration, because models without gradient buffers
    use that configuration too.
    """
    for linear in module.modules():
        if hasattr(linear, "gradient_accumulation_fusion"):
            setattr(linear, "gradient_accumulation_fusion", True)  # noqa: B010


def _finalize(chunks: list[Any], _num_tokens: Any, **groups: Any) -> None:
    """Call Megatron-Core's function, but skip its pass that divides all gradients by the tokens.

    `train.step` has already divided the loss.
    """
    finalize_model_grads(chunks, None, **groups)


def _gather_weights_once(optimizer: Any) -> None:
    """Make only the last of the chained optimizers gather updated weights over dp, for all of them.

    Dense and expert parameters have separate optimizers, and each would gather both after its step.
    """
    sharded = [part for part in optimizer.chained_optimizers if hasattr(part, "model_chunks")]
    for part in sharded[:-1]:
        part._defer_param_sync = True


def _overlaps_gather(config: RunConfig, engine: Engine) -> bool:
    """Return whether the gather of weights overlaps with the forward pass.

    Each module then waits for its own weights; `model.experts` waits for those of its experts.
    """
    settings = config.optimizer
    distributed = settings.use_distributed_optimizer and settings.optimizer == "adam"
    return engine.on_cuda and distributed and config.train.overlap_param_gather
