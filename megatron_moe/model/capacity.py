"""Expert capacity: select the tokens that an expert keeps if it cannot process all of them.

Megatron-Core drops among the tokens of one rank, and by position in the order of `torch.topk`,
which is undefined for ties. Here dropping depends on the tokens alone, and may be decided over the
whole sequences of a micro-batch, so that the result is the same under every tp and cp.

Shape letters of this module:

    T  tokens this rank routes   A  tokens of the micro-batch on all its tp and cp ranks
    E  num_moe_experts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_capacity
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.config.moe import Moe


@dataclass(frozen=True, slots=True)
class Capacity:
    """Number and selection of the tokens that an expert keeps; settings of a ``Moe`` section."""

    factor: float
    """Factor in Megatron-Core's formula ceil(tokens * K / E * factor)."""
    policy: str
    scope: str
    pad: bool

    def tokens(self, num_tokens: int, *, num_experts: int, topk: int) -> int:
        """Return how many of ``num_tokens`` tokens an expert keeps.

        >>> Capacity(1.25, "probs", "rank", False).tokens(64, num_experts=8, topk=2)
        20
        """
        return get_capacity(num_tokens * topk, num_experts, self.factor)


def capacity_of(moe: Moe) -> Capacity | None:
    """Return the capacity that the settings define; None if no token is dropped."""
    factor = moe.megatron_capacity_factor
    if factor is None:
        return None
    return Capacity(
        factor=factor,
        policy=moe.moe_token_drop_policy,
        scope=moe.capacity_scope,
        pad=moe.moe_pad_expert_input_to_capacity,
    )


def kept_choices(probs_TE: Tensor, chosen_TE: Tensor, limit: int, *, policy: str) -> Tensor:
    """Return the choices that fit, at most ``limit`` per expert, ``(T, E)`` bool.

    Args:
        probs_TE: Weights of the choices, zero elsewhere.
        chosen_TE: Choices of the router.
        limit: Number of tokens that an expert keeps.
        policy: ``position`` keeps the first; ``probs`` the most probable, and the first in a tie.
    """
    if limit >= len(chosen_TE):
        return chosen_TE
    if policy == "position":
        return chosen_TE & (chosen_TE.cumsum(dim=0) <= limit)
    score_TE = probs_TE.masked_fill(~chosen_TE, -1.0)
    best_TE = score_TE.argsort(dim=0, descending=True, stable=True)[:limit]
    return torch.zeros_like(chosen_TE).scatter_(0, best_TE, True) & chosen_TE


def kept_over_ranks(
    probs_TE: Tensor,
    chosen_TE: Tensor,
    index_T: Tensor,
    limit: int,
    *,
    policy: str,
    group: ProcessGroup,
) -> Tensor:
    """Apply `kept_choices` to the tokens of all ranks of ``group``; return this rank's rows.

    Args:
        probs_TE: As in `kept_choices`, for this rank's tokens.
        chosen_TE: As in `kept_choices`.
        index_T: Index of each of this rank's tokens among the ``A`` tokens of the group.
        limit: Number of tokens that an expert keeps of all ``A``.
        policy: As in `kept_choices`.
        group: Ranks that share the micro-batch's sequences (tp x cp).
    """
    packed_TX = torch.cat(
        [probs_TE.float(), chosen_TE.float(), index_T[:, None].to(torch.float32)], dim=1
    )
    parts = [torch.empty_like(packed_TX) for _ in range(group.size())]
    dist.all_gather(parts, packed_TX.contiguous(), group=group)
    all_AX = torch.cat(parts)
    experts = probs_TE.shape[1]
    all_AX = all_AX[all_AX[:, -1].argsort()]
    kept_AE = kept_choices(all_AX[:, :experts], all_AX[:, experts:-1].bool(), limit, policy=policy)
    return kept_AE[index_T]


def padded(kept_TE: Tensor, limit: int) -> Tensor:
    """Add choices of weight zero until every expert has exactly ``limit`` tokens."""
    filled_TE = kept_TE.int().topk(limit, dim=0, sorted=False).indices
    return torch.zeros_like(kept_TE).scatter_(0, filled_TE, True)
