"""Megatron-Core's top-k router with statistics, and a capacity that is independent of the layout.

Shape letters of this module:

    T  tokens this rank routes   E  num_moe_experts   K  moe_router_topk
    s  positions of this rank    B  micro_batch_size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.model.capacity import Capacity, kept_choices, kept_over_ranks, padded
from megatron_moe.parallel.sequence import zigzag

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called in each pass over T tokens with three tensors ``(T, E)``: every expert's share of a
token's score (shares sum to 1), the chosen experts, and the choices that were not dropped."""


def set_output_scales(modules: Iterable[torch.nn.Module], plan: ExpertPlan) -> None:
    """Set the plan's factor of the routed output in every router of ``modules``."""
    for module in modules:
        for router in module.modules():
            if isinstance(router, CountingRouter):
                assert router.layer_number is not None
                router.output_scale = plan.layer(router.layer_number - 1).output_scale


def expert_biases(modules: Iterable[torch.nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Return every router's bias and a copy, as finalizing gradients updates the biases too."""
    return [
        (router.expert_bias, router.expert_bias.clone())
        for module in modules
        for router in module.modules()
        if isinstance(router, CountingRouter) and router.expert_bias is not None
    ]


class CountingRouter(TopKRouter):
    """TopKRouter that drops tokens by `Capacity` and accumulates statistics during training.

    Choices and losses are Megatron-Core's and unchanged; tokens that exceed an expert's capacity
    are dropped here. Only passes that build a graph are counted, so evaluation is not counted and a
    recomputed layer is counted once.

    Args:
        capacity: Capacity of the experts; None drops no tokens.
        **megatron: Arguments of Megatron-Core's router.
    """

    output_scale: float = 1.0
    """Factor of the combine weights, and therefore of the routed experts' output."""

    observe: Observer | None = None
    """Called in every pass; it must not change its arguments."""

    _counts_4E: Tensor | None = None

    def __init__(self, *, capacity: Capacity | None = None, **megatron: Any) -> None:
        super().__init__(**megatron)
        self.capacity = capacity
        self._tp, self._cp = megatron["pg_collection"].tp, megatron["pg_collection"].cp
        # The dispatcher reads the capacity from the shared configuration, but Megatron-Core's
        # router must not drop tokens itself.
        self.config = copy(self.config)
        self.config.moe_expert_capacity_factor = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices of each token without dropped ones, both ``(T, E)``."""
        probs_TE, chosen_TE = super().routing(logits, padding_mask=padding_mask)
        map_TE = chosen_TE
        if self.capacity is not None:
            map_TE, probs_TE = self._drop(probs_TE, chosen_TE, batch=logits.shape[1])
        if self.training and torch.is_grad_enabled():
            self._count(logits.detach().flatten(0, -2), chosen_TE, probs_TE.detach())
        if self.observe is not None:
            scores_TE = self._log_scores(logits.detach().flatten(0, -2)).exp()
            self.observe(scores_TE, chosen_TE, map_TE & chosen_TE)
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

    def positions(self, length: int) -> Tensor:
        """Return the positions in the sequence of this rank's ``length`` positions."""
        tp, cp = self._tp, self._cp
        whole_S = torch.arange(length * tp.size() * cp.size())
        cp_part = zigzag(whole_S, dim=0, cp_rank=cp.rank(), cp_size=cp.size())
        return cp_part.chunk(tp.size())[tp.rank()]

    def _token_indices(self, length: int, batch: int) -> Tensor:
        """Return indices of this rank's tokens, ordered by position, then by sequence: ``(T,)``."""
        position_s = self.positions(length)
        index_sB = position_s[:, None] * batch + torch.arange(batch)
        return index_sB.flatten().to(self.weight.device)

    @torch.no_grad()
    def _count(self, logits_TE: Tensor, chosen_TE: Tensor, probs_TE: Tensor) -> None:
        """Add the statistics of this pass in float64, with few kernels: this runs in every layer.

        All four numbers of a token and expert are written into one tensor and summed at once.
        """
        numbers_4TE = torch.empty(4, *logits_TE.shape, dtype=torch.float64, device=logits_TE.device)
        chosen, score, log_share, kept = numbers_4TE
        log_p_TE = self._log_scores(logits_TE)
        chosen.copy_(chosen_TE)
        torch.exp(log_p_TE, out=score)
        torch.mul(log_p_TE, score, out=log_share)
        torch.gt(probs_TE, 0, out=kept)
        counts_4E = numbers_4TE.sum(dim=1)
        self._counts_4E = counts_4E if self._counts_4E is None else self._counts_4E.add_(counts_4E)

    def _log_scores(self, logits_TE: Tensor) -> Tensor:
        """Return the log of every expert's share of a token's score, in float64."""
        if self.score_function == "softmax":
            return logits_TE.log_softmax(dim=-1, dtype=torch.float64)
        log_TE = torch.nn.functional.logsigmoid(logits_TE.double())
        return log_TE - log_TE.logsumexp(dim=-1, keepdim=True)

    def take_counts(self) -> Tensor:
        """Return and reset the statistics, ``(4, E)`` in float64 on the router's device.

        Returns:
            Sums over tokens, per expert: tokens that chose it, before any were dropped; its share
            of the score (shares sum to 1 per token); share times log(share), whose sum over experts
            is minus the entropy (nats); and tokens that chose it and were kept.
        """
        counts_4E, self._counts_4E = self._counts_4E, None
        if counts_4E is None:
            return self.weight.new_zeros(4, len(self.weight), dtype=torch.float64)
        return counts_4E
