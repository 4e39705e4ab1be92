"""Build a run's routers, and find them in a model: the only factory of routers.

`docs/extending.md` adds a router step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_moe.config.moe import RouterGate
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.model.capacity import capacity_of
from megatron_moe.model.noisy_router import NoisyRouter
from megatron_moe.model.router import CapacityRouter

Factory = Callable[..., CapacityRouter]
"""Function of the arguments of Megatron-Core's TopKRouter."""


def _linear(config: RunConfig) -> Factory:
    return partial(CapacityRouter, capacity=capacity_of(config.moe))


def _noisy(network: str, config: RunConfig) -> Factory:
    own_loss = config.moe.moe_router_load_balancing_type == "cv_squared"
    return partial(
        NoisyRouter,
        network=network,
        balance=config.moe.moe_aux_loss_coeff if own_loss else 0.0,
        seed=config.run.seed,
        capacity=capacity_of(config.moe),
    )


ROUTERS: dict[RouterGate, Callable[[RunConfig], Factory]] = {
    "linear": _linear,
    "noisy_linear": partial(_noisy, "linear"),
    "noisy_mlp": partial(_noisy, "mlp"),
}
"""Factory of each ``moe.router_gate``."""

GATE_VALUES: dict[str, Callable[[Tensor], object]] = {
    "router_noise": torch.nn.init.zeros_,
    "router_output": torch.nn.init.eye_,
}
"""Initial values of the parameters of scope `Scope.GATE`: no noise, and an identity."""


def router_factory(config: RunConfig) -> Factory:
    """Return the factory of a run's routers."""
    return ROUTERS[config.moe.router_gate](config)


def routers_in(*modules: torch.nn.Module) -> Iterator[CapacityRouter]:
    """Yield the routers of all MoE layers in ``modules``."""
    for module in modules:
        for router in module.modules():
            if isinstance(router, CapacityRouter):
                yield router


def set_output_scales(modules: Iterable[torch.nn.Module], plan: ExpertPlan) -> None:
    """Set the plan's factor of the routed output in every router of ``modules``."""
    for router in routers_in(*modules):
        router.output_scale = plan.layer(router.layer).output_scale


def expert_biases(modules: Iterable[torch.nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Return every router's bias and a copy, as finalizing gradients updates the biases too."""
    biases = [router.expert_bias for router in routers_in(*modules)]
    return [(bias_E, bias_E.clone()) for bias_E in biases if bias_E is not None]
