"""Apply the experts of one rank with adapters beside their frozen weights, in a loop.

Shape letters of this module:

    T  tokens sent to this rank's experts, ordered by expert
    R  rows of one expert's products: its tokens, rounded up for bf16 on a CPU
    D  hidden_size              M  neurons of one expert
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_moe.model.experts import LoopExperts, runs_of, swiglu_backward


class AdaptedExperts(LoopExperts):
    """Experts whose linear layers have adapters, on the CPU and on CUDA.

    Without an update of the adapters, results are those of `LoopExperts` to the last bit.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply each expert to its tokens, and weight the result: ``(T, D)`` to ``(T, D)``."""
        experts: Any = self.local_experts
        counts, x_TD, outputs = tokens_per_expert.tolist(), permuted_local_hidden_states, []
        parts = zip(x_TD.split(counts), permuted_probs.split(counts), strict=True)
        for run, expert, (x_RD, prob_R) in zip(runs_of(counts, x_TD), experts, parts, strict=True):
            fc1, fc2, extra = expert.linear_fc1, expert.linear_fc2, run.rows - run.count
            prob_R1 = prob_R.to(x_TD.dtype)[:, None]
            if extra:
                x_RD, prob_R1 = (F.pad(rows, (0, 0, 0, extra)) for rows in (x_RD, prob_R1))
            h_R2M = F.linear(x_RD, fc1.weight) + fc1.adapter(x_RD)
            act_RM = _Activation.apply(h_R2M, prob_R1)
            outputs.append((F.linear(act_RM, fc2.weight) + fc2.adapter(act_RM))[: run.count])
        return torch.cat(outputs), None


class _Activation(torch.autograd.Function):
    """Save only the inputs: 2 M numbers per token instead of 5 M."""

    @staticmethod
    def forward(ctx: Any, h_R2M: Tensor, prob_R1: Tensor) -> Tensor:
        ctx.save_for_backward(h_R2M, prob_R1)
        gate_RM, up_RM = h_R2M.chunk(2, dim=-1)
        return F.silu(gate_RM).mul_(up_RM).mul_(prob_R1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h_R2M, prob_R1 = ctx.saved_tensors
        _, h_grad_R2M, prob_grad_R = swiglu_backward(h_R2M, prob_R1, grads[0].clone())
        return h_grad_R2M, prob_grad_R[:, None]
