"""Compute per-token cross entropy over a padded vocabulary that is sharded over tp.

Shape letters of this module:

    S  sequence length on this cp rank    B  micro-batch    V  this tp rank's part of the vocabulary
    N  tokens, S * B
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.model.cross_entropy import cross_entropy


def make_output_processor(*, vocab_size: int, tp_group: ProcessGroup) -> Callable[..., Tensor]:
    """Return the function that GPTModel applies to the last hidden states, for logits or losses.

    Rows that pad the vocabulary are not tokens: their logits are -inf, so neither the loss nor its
    gradient depends on the padding, and therefore on tp.

    Args:
        vocab_size: Size of the vocabulary without padding.
        tp_group: Ranks that share the vocabulary.
    """
    rank = tp_group.rank()

    def process(
        *,
        hidden_states: Tensor,
        output_layer: Callable[..., tuple[Tensor, None]],
        output_weight: Tensor | None,
        labels: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Return fp32 losses ``(B, S)`` if there are labels, else logits ``(B, S, V)``."""
        logits_SBV, _bias = output_layer(hidden_states, weight=output_weight)
        width = logits_SBV.shape[-1]
        real = min(max(vocab_size - rank * width, 0), width)
        if labels is not None and logits_SBV.is_cuda:
            label_N = labels.transpose(0, 1).flatten()
            losses_N = cross_entropy(
                logits_SBV.flatten(0, 1), label_N, real=real, tp_group=tp_group
            )
            return losses_N.view(logits_SBV.shape[:2]).transpose(0, 1).contiguous()
        if real < width:
            padding_V = torch.arange(width, device=logits_SBV.device) >= real
            logits_SBV = logits_SBV.masked_fill(padding_V, float("-inf"))
        if labels is None:
            return logits_SBV.transpose(0, 1)
        labels_SB = labels.transpose(0, 1).contiguous()
        losses_SB = vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB, tp_group=tp_group)
        return losses_SB.transpose(0, 1).contiguous()

    return process
