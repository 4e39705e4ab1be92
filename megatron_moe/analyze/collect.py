"""Observe the routers of a model during evaluation: which tokens chose which experts.

The forward passes are those of evaluation, unchanged, on any layout. A layer is on one pipeline
stage, and a token is routed on exactly one rank of those that shard the sequence (a slice per cp
rank, and of it one per tp rank) and the batch (dp), so counts are sums over all ranks. Only
positions that contribute to the loss are counted: no padding, and no samples that fill a round.

Shape letters of this module:

    T  tokens of a micro-batch that this rank routes   B  micro_batch_size
    S  sequence slice of this cp rank, s  its slice of this tp rank
    L  MoE layers   E  num_moe_experts   H = 2 halves of the text, the first samples and the last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.construct.measure import world_sum
from megatron_moe.data.batches import Batch
from megatron_moe.model.build import Model
from megatron_moe.model.router import CapacityRouter
from megatron_moe.model.routers import routers_in
from megatron_moe.train.step import mean_loss


@dataclass(frozen=True, slots=True)
class Routed:
    """Routing statistics of one text over all ranks, as returned by `Collector.read`."""

    loss: float
    """Loss in nats per token."""
    tokens: int
    chosen_HLE: Tensor
    """Number of tokens that chose each expert, before dropping, int64."""
    dropped_L: Tensor
    """Number of choices that a capacity limit dropped, int64."""
    together_LEE: Tensor
    """Number of tokens that chose both experts, or the one expert on the diagonal, int64."""
    confidence_L: Tensor
    """Sum over tokens of the best expert's score; the E scores of a token sum to one."""


class Collector:
    """Runs a model over text and counts its routing, on every rank.

    Args:
        model: This rank's part; only its MoE layers are observed.
        modules: Its chunks as Megatron-Core's schedules run them.
        config: The run.
        groups: This rank's process groups.
        layers: Global ids of the MoE layers.
    """

    def __init__(
        self,
        model: Model,
        modules: list[Any],
        config: RunConfig,
        groups: ProcessGroupCollection,
        *,
        layers: Sequence[int],
    ) -> None:
        self._model, self._modules, self._config, self._groups = model, modules, config, groups
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._counted: list[tuple[Tensor, Tensor]] = []
        self._passed: list[int] = []
        self._sums = self._zeros()

    def read(self, batches: list[Batch], *, num_samples: int) -> Routed:
        """Run the model over this rank's part of a text and return the statistics of all ranks.

        Args:
            batches: Micro-batches of this dp and cp rank; every rank must have the same number.
            num_samples: Number of samples of the text over all ranks.
        """
        self._sums, self._passed = self._zeros(), [0] * len(self._rows)
        self._counted = [self._masks(batch, num_samples) for batch in batches]
        routers = self._routers()
        for layer, router in routers:
            router.observe = partial(self._observe, self._rows[layer])
        try:
            loss = mean_loss(self._modules, batches, self._config, self._model, self._groups)
        finally:
            for _, router in routers:
                router.observe = None
        tokens = torch.tensor(self._tokens(batches))
        sums = replace(self._sums, loss=loss, tokens=int(world_sum(tokens)))
        return _checked(
            replace(
                sums,
                chosen_HLE=world_sum(sums.chosen_HLE),
                dropped_L=world_sum(sums.dropped_L),
                together_LEE=world_sum(sums.together_LEE),
                confidence_L=world_sum(sums.confidence_L),
            ),
            topk=self._config.moe.moe_router_topk,
        )

    def _zeros(self) -> Routed:
        layers, experts = len(self._rows), self._config.moe.num_moe_experts
        return Routed(
            loss=0.0,
            tokens=0,
            chosen_HLE=torch.zeros(2, layers, experts, dtype=torch.int64),
            dropped_L=torch.zeros(layers, dtype=torch.int64),
            together_LEE=torch.zeros(layers, experts, experts, dtype=torch.int64),
            confidence_L=torch.zeros(layers, dtype=torch.float64),
        )

    def _routers(self) -> list[tuple[int, CapacityRouter]]:
        routers = [(router.layer, router) for router in routers_in(*self._model.modules)]
        assert {layer for layer, _ in routers} <= set(self._rows), "a router outside MoE layers"
        return routers

    def _masks(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        """Return masks of this rank's tokens: which count, and which are in the second half."""
        tp = self._groups.tp
        counted_SB = (batch.loss_mask_BS > 0).T
        late_SB = (2 * batch.samples_B >= num_samples).expand(counted_SB.shape)
        counted_sB, late_sB = (x.chunk(tp.size())[tp.rank()] for x in (counted_SB, late_SB))
        return counted_sB.flatten(), late_sB.flatten()

    def _tokens(self, batches: list[Batch]) -> int:
        """Return the number of positions that contribute to the loss, on one rank per sequence."""
        if self._groups.tp.rank() or self._groups.pp.rank():
            return 0
        return sum(int((batch.loss_mask_BS > 0).sum()) for batch in batches)

    @torch.no_grad()
    def _observe(self, row: int, scores_TE: Tensor, chosen_TE: Tensor, kept_TE: Tensor) -> None:
        index = self._passed[row]
        self._passed[row] = index + 1
        if index >= len(self._counted):  # a batch that fills a round of the interleaved schedule
            return
        counted_T, late_T = (mask.to(chosen_TE.device) for mask in self._counted[index])
        chosen_TE = chosen_TE & counted_T[:, None]
        late_E = (chosen_TE & late_T[:, None]).sum(dim=0)
        x_TE = chosen_TE.double()  # exact up to 2^53 tokens
        best_T = scores_TE.amax(dim=-1).masked_fill(~counted_T, 0.0)
        sums = self._sums
        sums.chosen_HLE[0, row] += (chosen_TE.sum(dim=0) - late_E).cpu()
        sums.chosen_HLE[1, row] += late_E.cpu()
        sums.dropped_L[row] += (chosen_TE & ~kept_TE).sum().cpu()
        sums.together_LEE[row] += (x_TE.T @ x_TE).long().cpu()
        sums.confidence_L[row] += best_T.double().sum().cpu()


def _checked(routed: Routed, *, topk: int) -> Routed:
    """Check that each token was routed exactly once in each layer."""
    chosen_L = routed.chosen_HLE.sum(dim=(0, 2))
    assert (chosen_L == routed.tokens * topk).all(), (chosen_L, routed.tokens, topk)
    return routed
