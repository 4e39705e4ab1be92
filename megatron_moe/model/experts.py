"""Apply the experts of one rank without Transformer Engine, in a loop over their weights.

Shape letters of this module:

    T  tokens sent to this rank's experts, ordered by expert
    R  rows of one expert's products: its tokens, rounded up for bf16 on a CPU
    D  hidden_size              M  neurons of one expert on this etp rank
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_moe.runtime.gradients import add_product


class LoopExperts(SequentialMLP):
    """Megatron-Core's SequentialMLP: same parameters and checkpoint names, but a faster forward.

    The parallel linear layers of each expert hold the weights but are not called: the dispatcher
    has already gathered an expert's tokens over etp, so only two matrix products remain.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply each expert to its tokens, and weight the result: ``(T, D)`` to ``(T, D)``."""
        experts: Any = self.local_experts
        await_weights(experts)
        out_TD = apply_experts(
            permuted_local_hidden_states,
            permuted_probs,
            tokens_per_expert.tolist(),
            [expert.linear_fc1.weight for expert in experts],
            [expert.linear_fc2.weight for expert in experts],
        )
        return out_TD, None


def await_weights(experts: Iterable[Any]) -> None:
    """Run the hooks that wait for data parallelism's overlapped gather of parameters.

    They are registered on the linear layers, which would run them if they were called.
    """
    for expert in experts:
        for linear in (expert.linear_fc1, expert.linear_fc2):
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())


def apply_experts(
    x_TD: Tensor,
    prob_T: Tensor,
    counts: Sequence[int],
    fc1s_2MD: Sequence[Tensor],
    fc2s_DM: Sequence[Tensor],
) -> Tensor:
    """Return ``down(silu(gate x) * up x * prob)`` with each token's expert, ``(T, D)``.

    An expert without tokens gets a gradient of zero instead of None, because data parallelism waits
    for a gradient from every rank.

    Args:
        x_TD: Tokens, ordered by expert.
        prob_T: Routing weights, applied before the last product.
        counts: Number of tokens of each expert.
        fc1s_2MD: Gate and up projections of each expert, concatenated.
        fc2s_DM: Down projection of each expert.
    """
    return _Experts.apply(x_TD, prob_T, counts, *fc1s_2MD, *fc2s_DM)


@dataclass(frozen=True, slots=True)
class Run:
    """Range of one expert's tokens, and the number of rows of its products."""

    start: int
    count: int
    rows: int

    def take(self, all_T: Tensor) -> Tensor:
        """Return this expert's rows; extra rows are the next expert's, or zeros at the end."""
        rows = all_T[self.start : self.start + self.rows]
        missing = self.rows - len(rows)
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def weights(self, prob_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Return weights, ``(R, 1)``; zero for extra rows, so that sums exclude them."""
        prob_R1 = prob_T.new_zeros(self.rows, 1, dtype=dtype)
        prob_R1[: self.count, 0] = prob_T[self.start : self.start + self.count]
        return prob_R1

    def put_product(self, all_TD: Tensor, left: Tensor, right: Tensor) -> None:
        """Write ``left @ right`` to this expert's rows; the next expert overwrites extra rows."""
        if self.start + self.rows <= len(all_TD):
            torch.mm(left, right, out=all_TD[self.start : self.start + self.rows])
        else:
            all_TD[self.start : self.start + self.count] = (left @ right)[: self.count]


def runs_of(counts: Sequence[int], x_TD: Tensor) -> Iterator[Run]:
    """Yield each expert's run of tokens.

    oneDNN, which multiplies bf16 on CPU, compiles a kernel for every new shape, and token counts
    change at every step: compilation took four times as long as the products. So the number of bf16
    rows is rounded to at most 8 sizes between two powers of two (docs/performance.md).
    """
    rounded = x_TD.dtype == torch.bfloat16 and not x_TD.is_cuda
    for start, count in zip(accumulate(counts, initial=0), counts, strict=False):
        step = max(32, 1 << (count - 1).bit_length() >> 4) if rounded else 1
        yield Run(start, count, rows=-(-count // step) * step)


class _Experts(torch.autograd.Function):
    """Save only the result of the first product: 2 M numbers per token instead of 5 M.

    If data parallelism has a buffer for a weight's gradient, the gradient is accumulated there
    directly, without a separate tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, prob_T: Tensor, counts: Sequence[int], *weights: Tensor
    ) -> Tensor:
        ctx.runs = list(runs_of(counts, x_TD))
        ctx.weights = weights[: len(counts)], weights[len(counts) :]  # not saved: see _weight_grad
        out_TD, kept = torch.empty_like(x_TD), []
        for run, fc1_2MD, fc2_DM in zip(ctx.runs, *ctx.weights, strict=True):
            h_R2M = F.linear(run.take(x_TD), fc1_2MD)
            gate_RM, up_RM = h_R2M.chunk(2, dim=-1)
            act_RM = F.silu(gate_RM).mul_(up_RM).mul_(run.weights(prob_T, x_TD.dtype))
            run.put_product(out_TD, act_RM, fc2_DM.t())
            kept.append(h_R2M)
        ctx.save_for_backward(x_TD, prob_T, *kept)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *out_grads: Tensor) -> Any:
        (out_grad_TD,) = out_grads
        x_TD, prob_T, *kept = ctx.saved_tensors
        x_grad_TD, prob_grad_T = torch.empty_like(x_TD), torch.empty_like(prob_T)
        fc1_grads, fc2_grads = [], []
        for run, h_R2M, fc1_2MD, fc2_DM in zip(ctx.runs, kept, *ctx.weights, strict=True):
            out_grad_RD = run.take(out_grad_TD)
            prob_R1 = run.weights(prob_T, x_TD.dtype)
            grad_RM = out_grad_RD @ fc2_DM
            act_RM, h_grad_R2M, prob_grad_R = swiglu_backward(h_R2M, prob_R1, grad_RM)
            prob_grad_T[run.start : run.start + run.count] = prob_grad_R[: run.count]
            run.put_product(x_grad_TD, h_grad_R2M, fc1_2MD)
            fc1_grads.append(_weight_grad(fc1_2MD, h_grad_R2M, run.take(x_TD)))
            fc2_grads.append(_weight_grad(fc2_DM, out_grad_RD, act_RM))
        return x_grad_TD, prob_grad_T, None, *fc1_grads, *fc2_grads


def swiglu_backward(
    h_R2M: Tensor, prob_R1: Tensor, grad_RM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients from that of the weighted activations, which is overwritten.

    Returns:
        The weighted activations, the gradient of ``h_R2M``, and that of the routing weights.
    """
    gate_RM, up_RM = h_R2M.chunk(2, dim=-1)
    silu_RM = F.silu(gate_RM)
    act_RM = silu_RM * up_RM
    prob_grad_R = (grad_RM * act_RM).sum(dim=-1)
    grad_RM.mul_(prob_R1)
    h_grad_R2M = torch.empty_like(h_R2M)
    gate_grad_RM, up_grad_RM = h_grad_R2M.chunk(2, dim=-1)
    torch.mul(grad_RM, silu_RM, out=up_grad_RM)
    torch.ops.aten.silu_backward.grad_input(grad_RM.mul_(up_RM), gate_RM, grad_input=gate_grad_RM)
    return act_RM.mul_(prob_R1), h_grad_R2M, prob_grad_R


def _weight_grad(weight: Tensor, out_grad_RO: Tensor, in_RI: Tensor) -> Tensor | None:
    """Return the gradient of ``F.linear(in, weight)``, or a placeholder if main_grad holds it.

    A frozen weight has no gradient.

    The flag on the weight tells Megatron-Core's data parallelism not to read the placeholder, as
    after its own fused accumulation on CUDA.
    """
    if not weight.requires_grad:
        return None
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return out_grad_RO.t() @ in_RI
    add_product(main_grad, out_grad_RO, in_RI)
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010
    return torch.empty_like(weight)
