"""Tokens to the order of the experts and back on CUDA, by reading rows only.

Shape letters of this module:

    T  tokens   E  num_moe_experts   K  experts of a token   D  hidden_size
    P  T * K rows, in the order of the experts

Megatron-Core's functions without Transformer Engine add rows to zeros with atomics, in bf16 and in
any order: forward when tokens come back, backward when they go. If no token is dropped, each has K
rows, whose places are known; so both are a read of K rows and a sum in fp32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from megatron_moe.runtime.compiled import compiled_on_cuda


def install() -> None:
    """Put these functions in the place of Megatron-Core's, and leave token counts on the device."""
    token_dispatcher.permute = permute
    token_dispatcher.unpermute = unpermute
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher._maybe_dtoh_and_synchronize = _unless_alone(dispatcher._maybe_dtoh_and_synchronize)


def _unless_alone(copy_to_host: Any) -> Any:
    """Skip the copy of counts to the host, and the wait for it, if no rank exchanges tokens."""

    @functools.wraps(copy_to_host)
    def wrapped(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Any:
        alone = self.ep_size == 1 and self.tp_size == 1
        if alone and isinstance(self.num_out_tokens, int):  # else the host must know this number
            return tokens_per_expert
        return copy_to_host(self, point, tokens_per_expert)

    return wrapped


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: Any = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    **others: Any,
) -> tuple[Any, ...]:
    """Do what ``moe_utils.permute`` does; if tokens may be dropped, call it.

    Megatron-Core's dispatcher knows the number of rows without looking, as an int, if none is.
    """
    whole = isinstance(num_out_tokens, int) and len(tokens) > 0
    if not whole or probs is None or fused or drop_and_pad:
        return moe_utils.permute(
            tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad, **others
        )
    source_P, place_TK = routes(routing_map, num_out_tokens // len(tokens))
    row_P = source_P % len(tokens)
    setattr(row_P, "place_TK", place_TK)  # noqa: B010 - the dispatcher hands it to unpermute
    out_PD, prob_P = _Permute.apply(tokens, probs, source_P, row_P, place_TK)
    return out_PD, prob_P, row_P, None, others.get("tokens_per_expert")


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Do what ``moe_utils.unpermute`` does, for rows that `permute` has put in order."""
    place_TK = getattr(sorted_indices, "place_TK", None)
    if place_TK is None or probs is not None:
        return moe_utils.unpermute(
            permuted_tokens, sorted_indices, restore_shape, probs=probs, **others
        )
    return _Unpermute.apply(permuted_tokens, sorted_indices, place_TK)


def routes(routing_map_TE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return where each row comes from and where each token's rows are, without a wait.

    Args:
        routing_map_TE: True where a token chose an expert: ``topk`` times a token.
        topk: K.

    Returns:
        ``expert * T + token`` of each row, ``(P,)``, and the rows of each token, ``(T, K)``.
    """
    tokens, experts = routing_map_TE.shape
    rows, device = tokens * topk, routing_map_TE.device
    row_TE = routing_map_TE.T.flatten().cumsum(0).view(experts, tokens).T - 1
    choice_TE = routing_map_TE.cumsum(1) - 1 + topk * torch.arange(tokens, device=device)[:, None]
    source_TE = torch.arange(tokens * experts, device=device).view(experts, tokens).T
    return (
        _scattered(source_TE, row_TE, routing_map_TE, rows),
        _scattered(row_TE, choice_TE, routing_map_TE, rows).view(tokens, topk),
    )


def _scattered(value_TE: Tensor, to_TE: Tensor, chosen_TE: Tensor, size: int) -> Tensor:
    """Put the chosen values where they belong, and all others behind the end."""
    to_TE = torch.where(chosen_TE, to_TE, size)
    return value_TE.new_empty(size + 1).scatter_(0, to_TE.flatten(), value_TE.flatten())[:size]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, prob_TE: Tensor, source_P: Tensor, row_P: Tensor, place_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.shape = prob_TE.shape
        ctx.save_for_backward(source_P, place_TK)
        return x_TD.index_select(0, row_P), prob_TE.T.flatten().index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        source_P, place_TK = ctx.saved_tensors
        tokens, experts = ctx.shape
        prob_grad = grads[1].new_zeros(experts * tokens).scatter_(0, source_P, grads[1])
        return (
            sum_of_rows(grads[0], place_TK),
            prob_grad.view(experts, tokens).T,
            None,
            None,
            None,
        )


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, row_P: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_P)
        return sum_of_rows(x_PD, place_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (row_P,) = ctx.saved_tensors
        return grads[0].index_select(0, row_P), None, None


@compiled_on_cuda
def sum_of_rows(x_PD: Tensor, place_TK: Tensor) -> Tensor:
    """Return the sum of each token's K rows, ``(T, D)``, in fp32 at least and rounded once."""
    wide = torch.promote_types(x_PD.dtype, torch.float32)
    return x_PD[place_TK].sum(dim=1, dtype=wide).to(x_PD.dtype)
