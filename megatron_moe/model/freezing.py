"""Freeze parts of the model, before data parallelism makes buffers for those that are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.parts import Frozen, Part
from megatron_moe.hf.names import parameter_part
from megatron_moe.model.build import Model
from megatron_moe.model.routers import routers_in


def parameter_parts(model: Model) -> dict[Tensor, Part]:
    """Return the role of every parameter of this rank, and its layer in the whole model."""
    parts: dict[Tensor, Part] = {}
    for chunk in model.chunks:
        for name, parameter in chunk.module.named_parameters():
            role, layer = parameter_part(name)
            parts[parameter] = Part(role, None if layer is None else chunk.layers[layer])
    return parts


def freeze(model: Model, frozen: Frozen) -> None:
    """Exclude frozen parameters from training; call it on a new model.

    Megatron-Core then gives them no gradient buffer, no optimizer state and no reduction.
    """
    for parameter, part in parameter_parts(model).items():
        parameter.requires_grad_(not frozen.covers(part))
    for router in routers_in(*model.modules):
        if frozen.covers(Part("router", router.layer)):
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
