"""Freeze parameters by role, before data parallelism makes buffers for those that are trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.train import Role
from megatron_moe.hf.names import parameter_role
from megatron_moe.model.build import Model
from megatron_moe.model.routers import routers_in


def parameter_roles(model: Model) -> dict[Tensor, Role]:
    """Return the role of every parameter of this rank."""
    return {
        parameter: parameter_role(name)
        for module in model.modules
        for name, parameter in module.named_parameters()
    }


def freeze(model: Model, frozen: Collection[Role]) -> None:
    """Exclude the parameters of ``frozen`` roles from training; call it on a new model.

    Megatron-Core then gives them no gradient buffer, no optimizer state and no reduction.
    """
    for parameter, role in parameter_roles(model).items():
        parameter.requires_grad_(role not in frozen)
    for router in routers_in(*model.modules) if "router" in frozen else ():
        setattr(router, "frozen_expert_bias", True)  # noqa: B010 - read by Megatron-Core
    if "embeddings" in frozen:
        for module in model.modules:
            if module.pre_process:
                module.embedding.register_forward_hook(_start_graph)


def _start_graph(_: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Make the output of a frozen embedding require a gradient.

    Otherwise a pipeline stage without trained parameters has no backward pass, and recomputed
    layers, whose inputs must require gradients, would lose those of their parameters.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output
