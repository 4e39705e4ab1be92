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
    return _WeightedSwiglu.apply(x_TD, prob_T, fc1_2MD, fc2_DM)


class _WeightedSwiglu(torch.autograd.Function):
    """Keeps what the first product gave and nothing after it: 2 M numbers a token in place of 5 M.

    The gradient of a weight that data parallelism has a buffer for goes there at once, not through
    a tensor of its own that is added later.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, prob_T: Tensor, fc1_2MD: Tensor, fc2_DM: Tensor) -> Tensor:
        h_T2M = F.linear(x_TD, fc1_2MD)
        gate_TM, up_TM = h_T2M.chunk(2, dim=-1)
        act_TM = F.silu(gate_TM).mul_(up_TM).mul_(prob_T[:, None].to(x_TD.dtype))
        ctx.save_for_backward(x_TD, prob_T, h_T2M)
        ctx.weights = fc1_2MD, fc2_DM  # not saved: their main_grad is written to
        return F.linear(act_TM, fc2_DM)

    @staticmethod
    def backward(ctx: Any, *out_grads: Tensor) -> Any:
        (out_grad_TD,) = out_grads
        x_TD, prob_T, h_T2M = ctx.saved_tensors
        fc1_2MD, fc2_DM = ctx.weights
        gate_TM, up_TM = h_T2M.chunk(2, dim=-1)
        prob_T1 = prob_T[:, None].to(x_TD.dtype)
        silu_TM = F.silu(gate_TM)
        act_TM = silu_TM * up_TM
        grad_TM = out_grad_TD @ fc2_DM
        prob_grad_T = (grad_TM * act_TM).sum(dim=-1).to(prob_T.dtype)
        fc2_grad = _weight_grad(fc2_DM, out_grad_TD, act_TM.mul_(prob_T1))
        grad_TM.mul_(prob_T1)
        h_grad_T2M = torch.empty_like(h_T2M)
        gate_grad_TM, up_grad_TM = h_grad_T2M.chunk(2, dim=-1)
        torch.mul(grad_TM, silu_TM, out=up_grad_TM)
        torch.ops.aten.silu_backward.grad_input(
            grad_TM.mul_(up_TM), gate_TM, grad_input=gate_grad_TM
        )
        fc1_grad = _weight_grad(fc1_2MD, h_grad_T2M, x_TD)
        return h_grad_T2M @ fc1_2MD, prob_grad_T, fc1_grad, fc2_grad


def _weight_grad(weight: Tensor, out_grad_TO: Tensor, in_TI: Tensor) -> Tensor:
    """Gradient of ``F.linear(in, weight)``; where it was added to main_grad, a tensor of its shape.

    Megatron-Core's data parallelism knows the latter by the mark and reads nothing of it, as after
    its own fused accumulation on CUDA.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return out_grad_TO.t() @ in_TI
    if main_grad.dtype == in_TI.dtype:
        main_grad.addmm_(out_grad_TO.t(), in_TI)
    else:
        main_grad.add_(out_grad_TO.t() @ in_TI)
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010
    return torch.empty_like(weight)
