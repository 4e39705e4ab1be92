"""List the optimizers, one row each: its settings for Megatron-Core, and the state to save.

`docs/extending.md` adds an optimizer step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import Tensor

from megatron_moe.config.parts import Part, counts_layers, factor_of
from megatron_moe.config.run import RunConfig
from megatron_moe.config.train import Optimizer
from megatron_moe.runtime.adamw import ClipsGradients, FusedAdamW, StoredMoments


@dataclass(frozen=True, slots=True)
class OptimizerRow:
    """One optimizer."""

    settings: Callable[[Optimizer], dict[str, Any]]
    """Fields of Megatron-Core's OptimizerConfig that only this optimizer reads."""
    state: tuple[str, ...]
    """Keys of the state of each parameter: tensors of its shape, zero before the first step. They
    are saved, and sliced for any other layout."""


def _adam(settings: Optimizer) -> dict[str, Any]:
    """Return the settings of AdamW."""
    return {name: getattr(settings, name) for name in ("adam_beta1", "adam_beta2", "adam_eps")}


def _muon(settings: Optimizer) -> dict[str, Any]:
    """Return the settings of Muon, and those of AdamW for what is not a matrix.

    tp ranks gather a matrix and orthogonalize all of it, so that tp changes nothing.
    """
    own = {name: getattr(settings, name) for name in ("muon_momentum", "muon_extra_scale_factor")}
    return {**_adam(settings), **own, "muon_nesterov": True, "muon_tp_mode": "duplicated"}


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adam": OptimizerRow(_adam, state=("exp_avg", "exp_avg_sq")),
    "muon": OptimizerRow(_muon, state=("momentum_buffer",)),
}
"""Optimizers by Megatron-Core's name, ``OptimizerConfig.optimizer``."""


def optimizer_config(config: RunConfig, *, overlap_param_gather: bool) -> OptimizerConfig:
    """Return the configuration of Megatron-Core's optimizer."""
    settings, bf16 = config.optimizer, config.train.precision == "bf16"
    by_matrix = settings.optimizer == "muon"
    return OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer and not by_matrix,
        use_layer_wise_distributed_optimizer=settings.use_distributed_optimizer and by_matrix,
        overlap_param_gather=overlap_param_gather,
        muon_fp32_matmul_prec="medium" if bf16 else "highest",  # medium: in bf16
        **OPTIMIZERS[settings.optimizer].settings(settings),
    )


def group_overrides(
    config: RunConfig,
    settings: OptimizerConfig,
    parts: Mapping[Tensor, Part],
    *,
    updates: Mapping[str, int] | None,
) -> dict[ParamKey, Any]:
    """Return what distinguishes groups of parameters: weight decay, and settings by part.

    Args:
        config: The run's configuration.
        settings: Megatron-Core's configuration of the optimizer.
        parts: Part of the model that each parameter of this rank belongs to.
        updates: Updates by label in the checkpoint to restore; its parts are groups even if no
            setting distinguishes them.
    """
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(settings))
    optimizer, named = config.optimizer, named_parts(config)
    if updates is None and not (named or config.train.stages):
        return overrides
    by_layer = counts_layers([*named, *(updates or ())])
    for part in dict.fromkeys(
        part if by_layer else Part(part.role, None) for part in parts.values()
    ):
        factor = factor_of(optimizer.lr_multipliers, part)
        rates = {"max_lr": optimizer.lr * factor, "min_lr": optimizer.min_lr * factor}
        label = {"role": part.label(by_layer=by_layer)}
        overrides[_of(part, parts, by_layer)] = label | (rates if factor != 1 else {})
        decay = factor_of(optimizer.weight_decay_multipliers, part)
        if decay != 1:
            overrides[_of(part, parts, by_layer, matrices=True)] = {"wd_mult": decay}
    return overrides


def _of(
    part: Part, parts: Mapping[Tensor, Part], by_layer: bool, *, matrices: bool = False
) -> ParamKey:
    """Match the parameters of a part, or only those of them that have weight decay."""

    def matches(parameter: Tensor, name: str) -> bool:
        decays = parameter.dim() > 1 and not name.endswith(".bias")
        own = parts[parameter] == part if by_layer else parts[parameter].role == part.role
        return own and (decays or not matrices)

    name = f"{part.label(by_layer=by_layer)} {matrices}"
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def named_parts(config: RunConfig) -> list[str]:
    """Return the names of parts that settings treat differently from others."""
    optimizer, train = config.optimizer, config.train
    frozen = [*train.freeze, *(name for stage in train.stages for name in stage.freeze)]
    return [*frozen, *optimizer.lr_multipliers, *optimizer.weight_decay_multipliers]


def store_moments(optimizer: Any, settings: Optimizer) -> None:
    """Make a new optimizer keep its moments as the settings say.

    Megatron-Core's own settings of these names need Transformer Engine's FusedAdam, or update on
    the CPU; `FusedAdamW` is the same on every machine.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    stored = StoredMoments(
        {
            "exp_avg": dtypes[settings.exp_avg_dtype],
            "exp_avg_sq": dtypes[settings.exp_avg_sq_dtype],
        },
        on_host=settings.optimizer_cpu_offload,
    )
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            assert isinstance(part.optimizer, FusedAdamW), type(part.optimizer)
            part.optimizer.moments = stored


def new_state(part: Any, parameter: Tensor, name: str) -> Tensor:
    """Return the state of a parameter before its first update, under one of `state_keys`."""
    if isinstance(part.optimizer, FusedAdamW):
        return part.optimizer.moments.zeros(parameter, name)
    return torch.zeros_like(parameter, dtype=torch.float32)


def element_bytes(part: Any) -> tuple[int, int]:
    """Return the bytes of one element's state on the device and in host memory."""
    if isinstance(part.optimizer, FusedAdamW):
        moments = part.optimizer.moments
        return moments.device_bytes(), moments.num_bytes() - moments.device_bytes()
    return torch.float32.itemsize * len(state_keys(part)), 0


def state_keys(part: Any) -> tuple[str, ...]:
    """Return the keys of the state of one of Megatron-Core's optimizers."""
    (name,) = {group.get("optimizer", part.config.optimizer) for group in part.param_groups}
    return OPTIMIZERS[name].state


def clip_and_step(optimizer: Any, total_norm: float) -> None:
    """Clip gradients of this norm and step; `optimizer.step` would compute the norm a second time.

    Args:
        optimizer: Megatron-Core's chain of optimizers.
        total_norm: Norm of all gradients.
    """
    for part in optimizer.chained_optimizers:
        limit = {"max_norm": part.config.clip_grad, "total_norm": total_norm}
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if isinstance(part.optimizer, ClipsGradients):
            part.optimizer.clip(**limit)
        elif parameters:
            clip_grad_by_total_norm_fp32(parameters, **limit)
    optimizer.step_with_ready_grads()
