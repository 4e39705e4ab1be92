"""Run the CUDA branches of the torch engine on fake tensors, which have a device but no memory.

A script, because the adapter for CPUs that tests install turns CUDA into the CPU. Fake tensors
refuse what this checks for: operands on two devices, and anything that reads a value on the host,
as ``tolist`` does, for which the host would wait for the GPU. Compiled functions run uncompiled.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_moe.runtime import compiled

compiled.compiled_on_cuda = lambda function: function

from megatron_moe.model import block_mask, cross_entropy, grouped_experts  # noqa: E402
from megatron_moe.model.norm import RMSNorm  # noqa: E402
from megatron_moe.runtime import permute, shortcuts  # noqa: E402
from megatron_moe.runtime.adamw import FusedAdamW  # noqa: E402

T, E, K, D, M, V = 64, 8, 2, 256, 128, 1000
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


class Context:
    """Context of an autograd function, whose engine does not run without a GPU."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save these tensors."""
        self.saved_tensors = tensors


@torch.no_grad()
def both_ways(function: Any, *arguments: Any) -> None:
    """Run forward, then backward from gradients of one."""
    context = Context()
    out = function.forward(context, *arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    grads = function.backward(context, *[torch.ones_like(tensor) for tensor in outputs])
    for tensor in (*outputs, *grads):
        assert tensor is None or tensor.is_cuda, function
    for given, grad in zip(arguments, grads, strict=True):
        assert grad is None or (grad.shape, grad.dtype) == (given.shape, given.dtype), function


def bf16(*shape: int) -> Tensor:
    """Return a tensor of the model's dtype."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def check_experts() -> None:
    """Permute, multiply and unpermute tokens, with the counts on the device."""
    chosen_TE, prob_TE = torch.zeros(T, E, device="cuda") > 0, torch.rand(T, E, device="cuda")
    source_P, rows_TK = permute.routes(chosen_TE, K)
    both_ways(permute._Permute, bf16(T, D), prob_TE, source_P, source_P % T, rows_TK)
    both_ways(permute._Unpermute, bf16(T * K, D), source_P % T, rows_TK)
    weights = [bf16(2 * M, D) for _ in range(E)] + [bf16(D, M) for _ in range(E)]
    count_E = chosen_TE.sum(dim=0)
    grouped_experts.stacked = torch.stack  # fake tensors have no addresses
    inputs = bf16(T * K, D), torch.rand(T * K, device="cuda"), count_E, *weights
    both_ways(grouped_experts._GroupedExperts, *inputs)
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
    both_ways(grouped_experts._GroupedExperts, *inputs)


def check_the_rest() -> None:
    """Run masks, loss, norm, rotary embedding, gradient norm and optimizer update."""
    cuda = torch.device("cuda")
    offset_Bs = torch.zeros(2, 512, dtype=torch.long, device=cuda)
    position_s = block_mask.positions(1024, 2, 1, cuda)
    begin_Bs = position_s - offset_Bs
    mask_mod = block_mask.within_documents(begin_Bs, position_s)
    documents = block_mask._block_mask(begin_Bs, position_s, mask_mod, length=1024)
    for mask in (documents, block_mask.causal_blocks(1024, 2, 1, cuda)):
        assert mask.kv_indices.is_cuda
    label_N = torch.zeros(T, dtype=torch.long, device=cuda)
    for real in (0, V - 7, V):
        both_ways(cross_entropy._CrossEntropy, bf16(T, V), label_N, real, ALONE)
    freqs = torch.rand(16, 1, 1, 8, device=cuda)
    both_ways(
        shortcuts._Rotation, bf16(16, 2, 4, 8), *shortcuts._cos_and_sin(freqs, torch.bfloat16)
    )
    config: Any = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    with cuda:
        norm = RMSNorm(config, D)
    assert "FusedRmsNorm" in type(norm(bf16(T, D)).grad_fn).__name__
    assert shortcuts.l2_norm(0, torch.zeros(1), [[bf16(3), bf16(4)]])[0].is_cuda
    parameter = torch.nn.Parameter(torch.zeros(8, device=cuda))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = FusedAdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    optimizer.clip(max_norm=1.0, total_norm=3.0)
    optimizer.step()


if __name__ == "__main__":
    with FakeTensorMode():
        check_experts()
        check_the_rest()
        try:
            torch.zeros(2, device="cuda").tolist()
        except Exception as error:  # a control: reading a value must fail
            print(type(error).__name__)
