"""Megatron-Core's top-k router with a capacity that is independent of the layout.

`routers.py` builds routers and finds them in a model.

Shape letters of this module:

    T  tokens this rank routes   E  num_moe_experts   K  moe_router_topk
    s  positions of this rank    B  micro_batch_size
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_moe.model.capacity import Capacity, kept_choices, kept_over_ranks, padded
from megatron_moe.model.router_statistics import RouterStatistics, log_shares
from megatron_moe.parallel.sequence import positions_of_rank

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called in each pass over T tokens with three tensors ``(T, E)``: every expert's share of a
token's score (shares sum to 1), the chosen experts, and the choices that were not dropped."""


class Record(Protocol):
    """Wrapper of a router's passes; see `train.routing_record`."""

    def start_pass(self, samples_B: Tensor) -> None:
        """Set the samples of the next pass."""

    def routed(self, route: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the result of ``route`` with recorded or replayed choices."""
        ...


class CapacityRouter(TopKRouter):
    """TopKRouter that drops choices by `Capacity`, and scales the routed output.

    Choices and losses are Megatron-Core's and unchanged; choices that exceed an expert's capacity
    are dropped here. Only passes that build a graph enter the statistics, so evaluation does not
    and a recomputed layer does once.

    Args:
        capacity: Capacity of the experts; None drops no choices.
        **megatron: Arguments of Megatron-Core's router.
    """

    output_scale: float = 1.0
    """Factor of the combine weights, and therefore of the routed experts' output."""

    observe: Observer | None = None
    """Called in every pass; it must not change its arguments."""

    record: Record | None = None
    """Records or replays the choices of training passes."""

    guide: Callable[[Tensor], Tensor] | None = None
    """Called with the logits of passes that build a graph; returns them with a gradient added."""

    def __init__(self, *, capacity: Capacity | None = None, **megatron: Any) -> None:
        super().__init__(**megatron)
        self.capacity, self.statistics = capacity, RouterStatistics()
        self._tp, self._cp = megatron["pg_collection"].tp, megatron["pg_collection"].cp
        # The dispatcher reads the capacity from the shared configuration, but Megatron-Core's
        # router must not drop choices itself.
        self.config = copy(self.config)
        self.config.moe_expert_capacity_factor = None

    @property
    def layer(self) -> int:
        """Id of the layer, counted from 0 over the whole model."""
        assert self.layer_number is not None
        return self.layer_number - 1

    def set_balance(self, coefficient: float) -> None:
        """Set the coefficient of the load-balancing loss of this layer."""
        self.config.moe_aux_loss_coeff = coefficient

    def start_pass(self, samples_B: Tensor) -> None:
        """Prepare for a forward pass over these samples, given by their indices in the data."""
        if self.record is not None and self.training:
            self.record.start_pass(samples_B)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices of each token without dropped ones, both ``(T, E)``."""
        if self.guide is not None and self.training and torch.is_grad_enabled():
            logits = self.guide(logits)
        choose = partial(super().routing, logits, padding_mask=padding_mask)
        record = self.record if self.training else None
        probs_TE, chosen_TE = choose() if record is None else record.routed(choose)
        map_TE = chosen_TE
        if self.capacity is not None:
            map_TE, probs_TE = self._drop(probs_TE, chosen_TE, batch=logits.shape[1])
        if self.training and torch.is_grad_enabled():
            self.statistics.add(self._log_shares(logits), chosen_TE, probs_TE.detach())
        if self.observe is not None:
            self.observe(self._log_shares(logits).exp(), chosen_TE, map_TE & chosen_TE)
        if self.output_scale != 1.0:
            probs_TE = probs_TE * self.output_scale
        return probs_TE, map_TE

    def _drop(self, probs_TE: Tensor, chosen_TE: Tensor, *, batch: int) -> tuple[Tensor, Tensor]:
        capacity = self.capacity
        assert capacity is not None
        tokens, experts = chosen_TE.shape
        group = self.tp_cp_group
        whole = capacity.scope == "sequence"
        limit = capacity.tokens(
            tokens * (group.size() if whole else 1), num_experts=experts, topk=self.topk
        )
        weights_TE = probs_TE.detach()
        if whole and group.size() > 1:
            kept_TE = kept_over_ranks(
                weights_TE, chosen_TE, self._token_indices(tokens // batch, batch), limit,
                policy=capacity.policy, group=group,
            )  # fmt: skip
        else:
            kept_TE = kept_choices(weights_TE, chosen_TE, limit, policy=capacity.policy)
        probs_TE = probs_TE * kept_TE
        return (padded(kept_TE, limit) if capacity.pad else kept_TE), probs_TE

    def take_counts(self) -> Tensor:
        """Return and reset the statistics, ``(4, E)``; see `RouterStatistics.take`."""
        sums_4E = self.statistics.take()
        if sums_4E is None:
            return self.weight.new_zeros(4, len(self.weight), dtype=torch.float64)
        return sums_4E

    def positions(self, length: int) -> Tensor:
        """Return the positions in the sequence of this rank's ``length`` positions."""
        return positions_of_rank(length, tp=self._tp, cp=self._cp)

    def _token_indices(self, length: int, batch: int) -> Tensor:
        """Return indices of this rank's tokens, ordered by position, then by sequence: ``(T,)``."""
        position_s = self.positions(length)
        index_sB = position_s[:, None] * batch + torch.arange(batch)
        return index_sB.flatten().to(self.weight.device)

    def _log_shares(self, logits: Tensor) -> Tensor:
        return log_shares(logits.detach().flatten(0, -2), self.score_function)
