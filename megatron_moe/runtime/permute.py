"""Permute tokens to the order of the experts and back on CUDA, without atomics.

Shape letters of this module:

    T  tokens   E  num_moe_experts   K  experts per token   D  hidden_size
    P  T * K rows, ordered by expert

Without Transformer Engine, Megatron-Core's functions add rows to zeros with atomics, in bf16 and in
any order: in the forward pass of unpermute and the backward pass of permute. If no token is
dropped, each token has K rows at known indices, so both become a read of K rows and a sum in fp32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from megatron_moe.runtime.compiled import compiled_on_cuda


def install() -> None:
    """Replace Megatron-Core's functions by these, and leave token counts on the device."""
    token_dispatcher.permute = permute
    token_dispatcher.unpermute = unpermute
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher._maybe_dtoh_and_synchronize = _unless_alone(dispatcher._maybe_dtoh_and_synchronize)


def _unless_alone(copy_to_host: Any) -> Any:
    """Skip the copy of counts to the host, and its synchronization, if no ranks exchange tokens."""

    @functools.wraps(copy_to_host)
    def wrapped(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Any:
        alone = self.ep_size == 1 and self.tp_size == 1
        if alone and isinstance(self.num_out_tokens, int):  # else the host needs the counts
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
    """Compute the result of ``moe_utils.permute``; call that function if tokens may be dropped.

    If no token is dropped, Megatron-Core's dispatcher passes the number of rows as an int.
    """
    keeps_all = isinstance(num_out_tokens, int) and len(tokens) > 0
    if not keeps_all or probs is None or fused or drop_and_pad:
        return moe_utils.permute(
            tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad, **others
        )
    source_P, rows_TK = routes(routing_map, num_out_tokens // len(tokens))
    row_P = source_P % len(tokens)
    setattr(row_P, "rows_TK", rows_TK)  # noqa: B010 - the dispatcher passes it to unpermute
    out_PD, prob_P = _Permute.apply(tokens, probs, source_P, row_P, rows_TK)
    return out_PD, prob_P, row_P, None, others.get("tokens_per_expert")


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Compute the result of ``moe_utils.unpermute`` for rows that `permute` has ordered."""
    rows_TK = getattr(sorted_indices, "rows_TK", None)
    if rows_TK is None or probs is not None:
        return moe_utils.unpermute(
            permuted_tokens, sorted_indices, restore_shape, probs=probs, **others
        )
    return _Unpermute.apply(permuted_tokens, sorted_indices, rows_TK)


def routes(routing_map_TE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the source of each row and the rows of each token, without a synchronization.

    Args:
        routing_map_TE: True if a token chose an expert: ``topk`` entries per token.
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
    """Scatter the chosen values to their indices, and drop all others."""
    to_TE = torch.where(chosen_TE, to_TE, size)
    return value_TE.new_empty(size + 1).scatter_(0, to_TE.flatten(), value_TE.flatten())[:size]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, prob_TE: Tensor, source_P: Tensor, row_P: Tensor, rows_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.shape = prob_TE.shape
        ctx.save_for_backward(source_P, rows_TK)
        return x_TD.index_select(0, row_P), prob_TE.T.flatten().index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        source_P, rows_TK = ctx.saved_tensors
        tokens, experts = ctx.shape
        prob_grad = grads[1].new_zeros(experts * tokens).scatter_(0, source_P, grads[1])
        return (
            sum_of_rows(grads[0], rows_TK),
            prob_grad.view(experts, tokens).T,
            None,
            None,
            None,
        )


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, row_P: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_P)
        return sum_of_rows(x_PD, rows_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (row_P,) = ctx.saved_tensors
        return grads[0].index_select(0, row_P), None, None


@compiled_on_cuda
def sum_of_rows(x_PD: Tensor, rows_TK: Tensor) -> Tensor:
    """Return the sum of each token's K rows, ``(T, D)``, in at least fp32 and rounded once."""
    wide = torch.promote_types(x_PD.dtype, torch.float32)
    return x_PD[rows_TK].sum(dim=1, dtype=wide).to(x_PD.dtype)
