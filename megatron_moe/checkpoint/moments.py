"""The optimizer's numbers by parameter: which part of each this rank keeps, and where.

Three optimizers of Megatron-Core hold them differently: the distributed one keeps a run of numbers
of each parameter, the others whole parameters; with bf16 weights there are fp32 master weights too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Owned:
    """What this rank keeps of one parameter."""

    parameter: Tensor
    begin: int
    """First number, in the flattened parameter, that the tensors below hold."""
    tensors: dict[str, Tensor]
    """Flat and equally long: exp_avg, exp_avg_sq and, with bf16 weights, master."""


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that a chained one chains; else itself."""
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def owned(optimizer: MegatronOptimizer) -> Iterator[Owned]:
    """Everything this rank keeps; moments that no step has made yet are made, as zeros."""
    for part in parts(optimizer):
        for parameter, begin, main in _main_parameters(part):
            moments = part.optimizer.state[main]
            for name in MOMENTS:
                if name not in moments:
                    moments[name] = torch.zeros_like(main, dtype=torch.float32)
            tensors = {name: moments[name].view(-1) for name in MOMENTS}
            if main.dtype != parameter.dtype:
                tensors["master"] = main.detach().view(-1)
            yield Owned(parameter, begin, tensors)


def _main_parameters(part: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Each model parameter, the first number kept of it, and what the optimizer updates."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            begin = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, begin, part.optimizer.param_groups[group]["params"][order]
        return
    masters = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        masters = {
            main: parameter
            for parameters, mains in zip(
                part.float16_groups, part.fp32_from_float16_groups, strict=True
            )
            for parameter, main in zip(parameters, mains, strict=True)
        }
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            yield masters.get(main, main), 0, main


def updates_made(optimizer: MegatronOptimizer) -> int:
    """Updates so far, which Adam's bias correction counts."""
    return max(
        (int(group.get("step", 0)) for part in parts(optimizer) for group in _groups(part)),
        default=0,
    )


def set_updates_made(optimizer: MegatronOptimizer, updates: int) -> None:
    """Continue the count of a checkpoint."""
    for part in parts(optimizer):
        for group in _groups(part):
            group["step"] = updates


def _groups(part: Any) -> list[dict[str, Any]]:
    return part.optimizer.param_groups
