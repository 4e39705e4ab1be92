"""Apply the experts of one rank on CUDA, with one grouped product instead of a loop.

Shape letters of this module:

    T  tokens sent to this rank's experts, ordered by expert
    D  hidden_size      M  neurons of one expert on this etp rank      E  experts of this rank

The token counts stay on the device, so nothing here waits for the GPU. The weights of all experts
are one view (`stacking`), and so are their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_moe.model.experts import LoopExperts, await_weights
from megatron_moe.model.stacking import ALIGNMENT_BYTES, BackToFront, lay_out, stacked
from megatron_moe.runtime.compiled import compiled_on_cuda
from megatron_moe.runtime.gradients import begin_products


@dataclass(frozen=True, slots=True)
class ExpertKernel:
    """Kernel for the products of a layer's experts, and the reason for the choice, for the log."""

    name: Literal["grouped_mm", "loop"]
    reason: str


def expert_kernel(
    *, capability: tuple[int, int] | None, dtype: torch.dtype, sizes: Sequence[int], stackable: bool
) -> ExpertKernel:
    """Choose between one grouped product and a product per expert.

    Args:
        capability: Compute capability of the CUDA device; None on a CPU.
        dtype: Dtype of the weights and tokens.
        sizes: hidden_size, and the number of neurons of one expert on this etp rank.
        stackable: Whether the weights of a layer's experts are one view.
    """
    if capability is None:
        return ExpertKernel("loop", "there is no CPU kernel for grouped products")
    device = f"compute capability {capability[0]}.{capability[1]}"
    if capability[0] not in (9, 10):
        return ExpertKernel("loop", f"torch has no kernel for grouped products on {device}")
    if dtype != torch.bfloat16:
        return ExpertKernel("loop", f"torch's grouped products are bf16, not {dtype}")
    if any(size * dtype.itemsize % ALIGNMENT_BYTES for size in sizes):
        return ExpertKernel("loop", f"rows of {tuple(sizes)} elements are not 16-byte aligned")
    if not stackable:
        return ExpertKernel(
            "loop", "the weights of the experts are not at equal distances in memory"
        )
    return ExpertKernel("grouped_mm", f"bf16 on {device}, weights in one view")


def kernel_in(modules: Iterable[torch.nn.Module]) -> ExpertKernel | None:
    """Return the kernel of the experts in these models, or None if there are no grouped experts."""
    layers = (layer for module in modules for layer in module.modules())
    return next((layer.kernel() for layer in layers if isinstance(layer, GroupedExperts)), None)


class GroupedExperts(LoopExperts):
    """`LoopExperts` with weights laid out in memory for one grouped product.

    Parameter names, checkpoints and results are those of `LoopExperts`, which is the fallback for
    devices, dtypes and memory layouts that `expert_kernel` does not support.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.local_experts = BackToFront(list(self.local_experts))

    def weights(self) -> tuple[list[Any], list[Any]]:
        """Return the lists of the experts' first and second weights, ``(2M, D)`` and ``(D, M)``."""
        experts: Any = self.local_experts
        return (
            [expert.linear_fc1.weight for expert in experts],
            [expert.linear_fc2.weight for expert in experts],
        )

    def lay_out(self) -> None:
        """Move the weights into one storage, for passes without data parallelism's buffer."""
        for weights in self.weights():
            lay_out(weights)

    def kernel(self) -> ExpertKernel:
        """Return the kernel that the next pass will use, and the reason."""
        fc1s_2MD, fc2s_DM = self.weights()
        weight = fc2s_DM[0]
        return expert_kernel(
            capability=torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None,
            dtype=weight.dtype,
            sizes=weight.shape,
            stackable=stacked(fc1s_2MD) is not None and stacked(fc2s_DM) is not None,
        )

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply each expert to its tokens, and weight the result: ``(T, D)`` to ``(T, D)``."""
        if self.kernel().name == "loop":
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        await_weights(self.local_experts)
        fc1s_2MD, fc2s_DM = self.weights()
        out_TD = grouped_experts(
            permuted_local_hidden_states, permuted_probs, tokens_per_expert, fc1s_2MD, fc2s_DM
        )
        return out_TD, None


def lay_out_experts(modules: Iterable[torch.nn.Module]) -> None:
    """Move the weights of each layer's experts into one storage, for grouped products.

    Call it once when the model is on its device, before data parallelism or an evaluation. It holds
    a second copy of one layer's weights at a time.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, GroupedExperts):
                layer.lay_out()


def grouped_experts(
    x_TD: Tensor,
    prob_T: Tensor,
    count_E: Tensor,
    fc1s_2MD: Sequence[Tensor],
    fc2s_DM: Sequence[Tensor],
) -> Tensor:
    """Return ``down(silu(gate x) * up x * prob)`` with each token's expert, like `apply_experts`.

    Args:
        x_TD: Tokens, ordered by expert.
        prob_T: Routing weights, applied before the last product.
        count_E: Number of tokens of each expert, on any device. Their sum must be T.
        fc1s_2MD: Gate and up projections of each expert, concatenated; `stacked` must accept them.
        fc2s_DM: Down projection of each expert; `stacked` must accept them.
    """
    count_E = count_E.to(x_TD.device, non_blocking=True)
    return _GroupedExperts.apply(x_TD, prob_T, count_E, *fc1s_2MD, *fc2s_DM)


class _GroupedExperts(torch.autograd.Function):
    """Save the tokens and the result of the first product, like the loop."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, prob_T: Tensor, count_E: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.weights = weights[: len(count_E)], weights[len(count_E) :]
        ctx.stacks = fc1_E2MD, fc2_EDM = tuple(_stack(weights) for weights in ctx.weights)
        end_E = count_E.cumsum(0, dtype=torch.int32)
        h_T2M = _grouped(x_TD, fc1_E2MD.transpose(1, 2), end_E)
        ctx.save_for_backward(x_TD, prob_T, count_E, end_E, h_T2M)
        return _grouped(swiglu(h_T2M, prob_T), fc2_EDM.transpose(1, 2), end_E)

    @staticmethod
    def backward(ctx: Any, *out_grads: Tensor) -> Any:
        x_TD, prob_T, count_E, end_E, h_T2M = ctx.saved_tensors
        fc1s_2MD, fc2s_DM = ctx.weights
        fc1_E2MD, fc2_EDM = ctx.stacks
        out_grad_TD = out_grads[0].contiguous()
        grad_TM = _grouped(out_grad_TD, fc2_EDM, end_E)
        act_TM, h_grad_T2M, prob_grad_T = swiglu_backward(h_T2M, prob_T, grad_TM)
        x_grad_TD = _grouped(h_grad_T2M, fc1_E2MD, end_E)
        fc1_grads = _weight_grads(fc1s_2MD, h_grad_T2M, x_TD, count_E, end_E)
        fc2_grads = _weight_grads(fc2s_DM, out_grad_TD, act_TM, count_E, end_E)
        return x_grad_TD, prob_grad_T, None, *fc1_grads, *fc2_grads


def _stack(weights: Sequence[Tensor]) -> Tensor:
    weight_EOI = stacked(weights)
    assert weight_EOI is not None, "expert_kernel chooses the loop for these"
    return weight_EOI


def _grouped(left_TI: Tensor, right_EIO: Tensor, end_E: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix, ``(T, O)``; skip the call if there are no rows."""
    if not len(left_TI):
        return left_TI.new_empty(0, right_EIO.shape[2])
    return F.grouped_mm(left_TI, right_EIO, offs=end_E)


@compiled_on_cuda
def swiglu(h_T2M: Tensor, prob_T: Tensor) -> Tensor:
    """Return ``silu(gate) * up * prob``, ``(T, M)``, computed in fp32 and rounded once."""
    gate_TM, up_TM = h_T2M.float().chunk(2, dim=-1)
    return (F.silu(gate_TM) * up_TM * prob_T.float()[:, None]).to(h_T2M.dtype)


@compiled_on_cuda
def swiglu_backward(
    h_T2M: Tensor, prob_T: Tensor, grad_TM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute `swiglu`; return its result and the gradients of ``h_T2M`` and ``prob_T``."""
    gate_TM, up_TM = h_T2M.float().chunk(2, dim=-1)
    prob_T1, grad_TM = prob_T.float()[:, None], grad_TM.float()
    sigmoid_TM = gate_TM.sigmoid()
    silu_TM = gate_TM * sigmoid_TM
    act_TM = silu_TM * up_TM
    prob_grad_T = (grad_TM * act_TM).sum(dim=-1)
    weighted_TM = grad_TM * prob_T1
    slope_TM = sigmoid_TM * (1 + gate_TM * (1 - sigmoid_TM))
    h_grad_T2M = torch.cat([weighted_TM * up_TM * slope_TM, weighted_TM * silu_TM], dim=-1)
    dtype = h_T2M.dtype
    return (act_TM * prob_T1).to(dtype), h_grad_T2M.to(dtype), prob_grad_T.to(prob_T.dtype)


def _weight_grads(
    weights: Sequence[Tensor], out_grad_TO: Tensor, in_TI: Tensor, count_E: Tensor, end_E: Tensor
) -> Sequence[Tensor | None]:
    """Return the gradients of the experts' weights, or add them to ``main_grad``.

    Frozen weights have no gradients; a layer's experts are frozen together.

    In the latter case each result is a view of one tensor that nothing reads: data parallelism only
    asserts that a gradient exists.
    """
    if not weights[0].requires_grad:
        return [None] * len(weights)
    if len(in_TI):
        grad_EOI = F.grouped_mm(out_grad_TO.t(), in_TI, offs=end_E)
    else:
        grad_EOI = in_TI.new_zeros(len(weights), out_grad_TO.shape[1], in_TI.shape[1])
    main_grads = [getattr(weight, "main_grad", None) for weight in weights]
    used_E11 = (count_E > 0)[:, None, None]
    if any(main_grad is None for main_grad in main_grads):
        return list(torch.where(used_E11, grad_EOI, 0).contiguous().unbind())
    _add(main_grads, grad_EOI, used_E11)
    for weight in weights:
        setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010
    unread_OI = torch.empty_like(weights[0])
    return [unread_OI.view_as(weight) for weight in weights]


def _add(main_grads: Sequence[Any], grad_EOI: Tensor, used_E11: Tensor) -> None:
    firsts = [begin_products(main_grad) for main_grad in main_grads]
    main_EOI = stacked(main_grads) if len(set(firsts)) == 1 else None
    if main_EOI is not None:
        _accumulate(main_EOI, grad_EOI, used_E11, firsts[0])
        return
    for main_grad, grad_OI, used_11, first in zip(
        main_grads, grad_EOI, used_E11, firsts, strict=True
    ):
        _accumulate(main_grad, grad_OI, used_11, first)


@compiled_on_cuda
def _accumulate(main_EOI: Tensor, grad_EOI: Tensor, used_E11: Tensor, first: bool) -> None:
    """Add the gradients to the buffer in one pass, or overwrite it.

    Gradients of experts without tokens are set to zero: the kernel for compute capability 10.0
    leaves their memory uninitialized (pytorch/pytorch#172439).
    """
    grad_EOI = torch.where(used_E11, grad_EOI, 0).to(main_EOI.dtype)
    main_EOI.copy_(grad_EOI if first else main_EOI + grad_EOI)
