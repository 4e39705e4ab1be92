"""Adapt the coefficient of each layer's load-balancing loss to its imbalance (arXiv 2406.06563).

A layer whose experts are used evenly needs no balancing loss, which only disturbs its router; a
layer that drops tokens needs more. `adapted` computes equations 7 to 9 of section 4.2. Defaults of
the settings are those of Skywork-MoE there: sensitivity 1/5, bound 0.01, decay 0.99. That the first
coefficient is the bound, and the rate of a run without a capacity, are our choices. Coefficients
are a function of numbers that are summed over all ranks, in float64 on the host, so they are the
same on every rank.

Shape letters of this module:

    L  MoE layers   E  num_moe_experts
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_moe.config.moe import Moe
from megatron_moe.model.routers import routers_in

Coefficients = dict[int, float]
"""Coefficient of each MoE layer, by the layer's id."""


def drop_rates(chosen_LE: Tensor, kept_L: Tensor, *, capacity: bool) -> Tensor:
    """Return the share of each layer's choices that exceed the experts' capacity, ``(L,)``.

    Without a capacity, it is the share that a capacity of the mean load would drop.
    """
    choices_L = chosen_LE.sum(dim=1)
    if capacity:
        return 1 - kept_L / choices_L
    excess_LE = (chosen_LE - chosen_LE.mean(dim=1, keepdim=True)).clamp(min=0)
    return excess_LE.sum(dim=1) / choices_L


def adapted(current: Coefficients, chosen_LE: Tensor, kept_L: Tensor, moe: Moe) -> Coefficients:
    """Return the coefficients of the next step.

    Args:
        current: Coefficients of the step that was taken, in the order of the layers.
        chosen_LE: Tokens that chose each expert in that step.
        kept_L: Choices that were not dropped.
        moe: Settings; `moe_aux_loss_coeff` is the upper bound.
    """
    capacity = moe.moe_expert_capacity_factor is not None
    rate_L = drop_rates(chosen_LE, kept_L, capacity=capacity)
    target_L = (moe.aux_loss_sensitivity * rate_L).clamp(max=moe.moe_aux_loss_coeff)
    before_L = torch.tensor(list(current.values()), dtype=torch.float64)
    after_L = moe.aux_loss_decay * before_L + (1 - moe.aux_loss_decay) * target_L.double()
    return dict(zip(current, after_L.tolist(), strict=True))


def set_coefficients(modules: Iterable[torch.nn.Module], coefficients: Coefficients) -> None:
    """Set the coefficient of every router of ``modules``."""
    for router in routers_in(*modules):
        router.set_balance(coefficients[router.layer])
