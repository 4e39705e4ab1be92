"""The experts of one rank without Transformer Engine: a loop over expert weights.

Shape letters of this module:

    T  tokens sent to this rank's experts, in the order of the experts
    D  hidden_size              M  neurons of one expert on this etp rank
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class LoopExperts(SequentialMLP):
    """Megatron-Core's SequentialMLP with its parameters and checkpoint names, and a lean forward.

    The parallel linear layers of each expert hold the weights but are not called: an expert's
    tokens are already gathered over etp by the dispatcher, so what is left is two matrix products.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply each expert to its run of tokens, weighted: ``(T, D)`` to ``(T, D)``."""
        counts = tokens_per_expert.tolist()
        x_parts = permuted_local_hidden_states.split(counts)
        prob_parts = permuted_probs.split(counts)
        experts: Any = self.local_experts
        out_parts = [
            swiglu(x_TD, prob_T, expert.linear_fc1.weight, expert.linear_fc2.weight)
            for x_TD, prob_T, expert in zip(x_parts, prob_parts, experts, strict=True)
        ]
        return torch.cat(out_parts), None


def swiglu(x_TD: Tensor, prob_T: Tensor, fc1_2MD: Tensor, fc2_DM: Tensor) -> Tensor:
    """``down(silu(gate x) * up x * prob)``: the weight goes in before the last product.

    Without tokens the products still run: their gradient of zero is what keeps the collectives
    of data parallelism in step on every rank.
    """
    gate_TM, up_TM = F.linear(x_TD, fc1_2MD).chunk(2, dim=-1)
    h_TM = F.silu(gate_TM) * up_TM * prob_T[:, None].to(x_TD.dtype)
    return F.linear(h_TM, fc2_DM)
