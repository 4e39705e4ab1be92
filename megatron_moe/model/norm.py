"""RMSNorm without Transformer Engine that works under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron-Core to sum its gradient over tp.

    Under sequence parallelism each tp rank normalises other tokens, so the weight's gradient is a
    sum over ranks; Megatron-Core looks for the ``sequence_parallel`` mark to form it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
