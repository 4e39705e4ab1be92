"""Per-token cross entropy over a vocabulary that tp ranks share and padding rounds up.

Shape letters of this module:

    S  sequence of this cp rank    B  micro-batch    V  this tp rank's part of the vocabulary
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
    """What GPTModel does with the last hidden states: logits, and with labels the token losses.

    Rows that pad the vocabulary are no tokens: their logits are -inf, so neither the loss nor its
    gradient depends on how many there are, that is, on tp.

    Args:
        vocab_size: Tokens that exist.
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
        """``(B, S)`` losses in fp32 with labels, this tp rank's ``(B, S, V)`` logits without."""
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
