"""Megatron-Core's top-k router, watched, and with a capacity that does not depend on the layout.

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
"""Told of a pass over T tokens, each ``(T, E)``: every expert's share of a token's score, all of
them together one; which were chosen; and which of these no capacity limit dropped."""


def set_output_scales(modules: Iterable[torch.nn.Module], plan: ExpertPlan) -> None:
    """Tell every router of ``modules`` by how much the plan scales its layer's routed output."""
    for module in modules:
        for router in module.modules():
            if isinstance(router, CountingRouter):
                assert router.layer_number is not None
                router.output_scale = plan.layer(router.layer_number - 1).output_scale


def expert_biases(modules: Iterable[torch.nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Every router's bias and a copy of it: gradients that are finished move the biases too."""
    return [
        (router.expert_bias, router.expert_bias.clone())
        for module in modules
        for router in module.modules()
        if isinstance(router, CountingRouter) and router.expert_bias is not None
    ]


class CountingRouter(TopKRouter):
    """TopKRouter that drops by `Capacity` and adds up what it did in training.

    Choices and losses are Megatron-Core's and not changed; tokens that an expert has no room for
    are dropped here. Only passes that build a graph are counted, so evaluation does not count and a
    recomputed layer counts once.

    Args:
        capacity: None drops nothing.
        **megatron: What Megatron-Core's router takes.
    """

    output_scale: float = 1.0
    """Factor of the combine weights, and so of the routed experts' output."""

    observe: Observer | None = None
    """Called in every pass; it must change nothing."""

    _counts_4E: Tensor | None = None

    def __init__(self, *, capacity: Capacity | None = None, **megatron: Any) -> None:
        super().__init__(**megatron)
        self.capacity = capacity
        self._tp, self._cp = megatron["pg_collection"].tp, megatron["pg_collection"].cp
        # The dispatcher must know of the capacity (the shared configuration says it), and
        # Megatron-Core's router must not drop on its own.
        self.config = copy(self.config)
        self.config.moe_expert_capacity_factor = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices of each token, dropped ones left out: both ``(T, E)``."""
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
                weights_TE, chosen_TE, self._places(tokens // batch, batch), limit,
                policy=capacity.policy, group=group,
            )  # fmt: skip
        else:
            kept_TE = kept_choices(weights_TE, chosen_TE, limit, policy=capacity.policy)
        probs_TE = probs_TE * kept_TE
        return (padded(kept_TE, limit) if capacity.pad else kept_TE), probs_TE

    def positions(self, length: int) -> Tensor:
        """Places in the sequence of this rank's ``length`` positions."""
        tp, cp = self._tp, self._cp
        whole_S = torch.arange(length * tp.size() * cp.size())
        of_cp = zigzag(whole_S, dim=0, cp_rank=cp.rank(), cp_size=cp.size())
        return of_cp.chunk(tp.size())[tp.rank()]

    def _places(self, length: int, batch: int) -> Tensor:
        """Places of this rank's tokens, ordered by position and then sequence: ``(T,)``."""
        position_s = self.positions(length)
        place_sB = position_s[:, None] * batch + torch.arange(batch)
        return place_sB.flatten().to(self.weight.device)

    @torch.no_grad()
    def _count(self, logits_TE: Tensor, chosen_TE: Tensor, probs_TE: Tensor) -> None:
        """Add up this pass in float64, in few kernels: every layer and micro-batch pays for them.

        All four numbers of a token and expert are written into one tensor, and summed at once.
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
        """Logarithm of every expert's share of a token, all of them together one; float64."""
        if self.score_function == "softmax":
            return logits_TE.log_softmax(dim=-1, dtype=torch.float64)
        log_TE = torch.nn.functional.logsigmoid(logits_TE.double())
        return log_TE - log_TE.logsumexp(dim=-1, keepdim=True)

    def take_counts(self) -> Tensor:
        """Return what was counted, ``(4, E)`` in float64 on the router's device, and start anew.

        Returns:
            Sums over tokens, by expert: tokens that chose it, before any was dropped; its score,
            all E of a token together one; score times log(score), whose sum over experts is minus
            the entropy (nats); and tokens that chose it and were kept.
        """
        counts_4E, self._counts_4E = self._counts_4E, None
        if counts_4E is None:
            return self.weight.new_zeros(4, len(self.weight), dtype=torch.float64)
        return counts_4E
