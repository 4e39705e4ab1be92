"""Find the optimizer state of each parameter that this rank holds.

Megatron-Core has three optimizers: the distributed one keeps a run of elements of each parameter,
the other two keep whole parameters. With bf16 weights there are fp32 master weights too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from torch import Tensor

from megatron_moe.config.parts import updates_of
from megatron_moe.train.optimizers import new_state, state_keys


@dataclass(frozen=True, slots=True)
class Owned:
    """Optimizer state that this rank holds of one parameter."""

    parameter: Tensor
    begin: int
    """Index of the first element, in the flattened parameter, that the tensors below hold."""
    tensors: dict[str, Tensor]
    """One-dimensional, same length: `OptimizerRow.state` and, with bf16 weights, master."""
    label: str | None
    """Label of the part that the parameter belongs to, if the updates of parts are counted
    separately."""


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers inside a chained optimizer, or the optimizer itself."""
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def owned(optimizer: MegatronOptimizer) -> Iterator[Owned]:
    """Yield all optimizer state of this rank; create moments that do not exist yet, as zeros."""
    for part in parts(optimizer):
        roles = {p: group.get("role") for group in part.param_groups for p in group["params"]}
        for parameter, begin, main in _main_parameters(part):
            moments = part.optimizer.state[main]
            keys = state_keys(part)
            for name in keys:
                if name not in moments:
                    moments[name] = new_state(part, main, name)
            tensors = {name: moments[name].view(-1) for name in keys}
            if main.dtype != parameter.dtype:
                tensors["master"] = main.detach().view(-1)
            yield Owned(parameter, begin, tensors, roles[main])


def _main_parameters(part: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield each model parameter, its first held element, and the tensor the optimizer updates."""
    if part.is_stub_optimizer:  # all parameters of this kind are frozen
        return
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
    """Return the number of updates so far, which Adam's bias correction uses."""
    return max((int(group.get("step", 0)) for group in _groups(optimizer)), default=0)


def updates_by_role(optimizer: MegatronOptimizer) -> dict[str, int] | None:
    """Return the number of updates of each trained part; None if parts are not distinguished.

    All ranks must call it. A rank may hold no parameter of a part, and then not count its updates.
    """
    own: dict[str, int] = {}
    for group in _groups(optimizer):
        if "role" in group:
            own[group["role"]] = max(own.get(group["role"], 0), int(group.get("step", 0)))
    if not own:
        return None
    of_ranks: list[dict[str, int]] = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    trained = sorted(set().union(*of_ranks))
    return {label: max(updates.get(label, 0) for updates in of_ranks) for label in trained}


def set_updates_made(
    optimizer: MegatronOptimizer, updates: int, by_role: Mapping[str, int] | None = None
) -> None:
    """Set the number of updates to that of a checkpoint.

    Args:
        optimizer: Megatron-Core's optimizer.
        updates: Updates of all parameters.
        by_role: Updates of each part, if they were counted.
    """
    for group in _groups(optimizer):
        group["step"] = updates if by_role is None else updates_of(by_role, group["role"]) or 0


def _groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    return [group for part in parts(optimizer) for group in part.param_groups]
