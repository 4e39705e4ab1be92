"""Megatron-Core's top-k router, watched: what the tokens chose, counted where they choose.

Shape letters of this module:

    T  tokens this rank routes   E  num_moe_experts   K  moe_router_topk
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class CountingRouter(TopKRouter):
    """TopKRouter that adds up what it did in training since `take_counts` was last called.

    The routing itself is Megatron-Core's and is not changed. Only passes that build a graph are
    counted, so evaluation does not count and a recomputed layer counts once.
    """

    _chosen_E: Tensor | None = None
    _sums: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices of each token, as the base class gives them: both ``(T, E)``."""
        probs_TE, map_TE = super().routing(logits, padding_mask=padding_mask)
        if self.training and torch.is_grad_enabled():
            self._count(logits.detach().flatten(0, -2), probs_TE.detach())
        return probs_TE, map_TE

    @torch.no_grad()
    def _count(self, logits_TE: Tensor, probs_TE: Tensor) -> None:
        chosen_TK = logits_TE.topk(self.topk, dim=-1).indices
        chosen_E = torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[-1]).double()
        log_p_TE = logits_TE.double().log_softmax(dim=-1)
        entropy = -(log_p_TE.exp() * log_p_TE).sum()
        sums = torch.stack([(probs_TE > 0).sum().double(), entropy])
        self._chosen_E = chosen_E if self._chosen_E is None else self._chosen_E + chosen_E
        self._sums = sums if self._sums is None else self._sums + sums

    def take_counts(self) -> tuple[Tensor, Tensor]:
        """What was counted, and start anew.

        Returns:
            Tokens that chose each expert, before any was dropped, ``(E,)``; and ``(2,)``: choices
            that were kept, and the sum over tokens of the entropy (nats) of the softmax over all E.
        """
        chosen_E, sums = self._chosen_E, self._sums
        self._chosen_E = self._sums = None
        if chosen_E is None or sums is None:
            zeros = self.weight.new_zeros(len(self.weight) + 2, dtype=torch.float64)
            return zeros[:-2], zeros[-2:]
        return chosen_E, sums
