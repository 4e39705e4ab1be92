"""Tests of CUDA's cross entropy on CPU ranks, against float64 over the real vocabulary.

Shape letters: N tokens, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from ranks import run_on_ranks

from megatron_moe.model import cross_entropy as module
from megatron_moe.model.cross_entropy import cross_entropy
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.runtime.world import World

N = 12
CASES = [
    pytest.param(500, 1, id="V500-tp1"),
    pytest.param(500, 2, id="V500-tp2"),
    pytest.param(7, 2, id="V7-tp2-one-column-of-padding"),
    pytest.param(5, 4, id="V5-tp4-a-rank-of-padding-only"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocab_size", "tp"), CASES)
def test_losses_and_gradients_are_float64s(vocab_size: int, tp: int, dtype: torch.dtype):
    run_on_ranks(check, vocab_size, dtype, world_size=tp)


def check(world: World, vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    width = padded_vocabulary(vocab_size, world.size) // world.size
    first = world.rank * width
    real = max(min(vocab_size - first, width), 0)
    logits_NV = torch.randn(N, width * world.size, generator=generator) * 8
    logits_NV[0] += 300  # exponentials of unshifted logits would overflow
    logits_NV[:, vocab_size:] = 1000.0  # padding is the largest, so counting it would show
    logits_NV = logits_NV.to(dtype)
    label_N = torch.randint(0, vocab_size, (N,), generator=generator)
    grad_N = torch.rand(N, generator=generator)

    exact_NV = logits_NV[:, :vocab_size].double().requires_grad_()
    exact_N = F.cross_entropy(exact_NV, label_N, reduction="none")
    exact_N.backward(grad_N.double())
    assert exact_NV.grad is not None

    leaf = logits_NV[:, first : first + width].clone().requires_grad_()
    own_NV = leaf.clone()  # like the output of a product
    memory = own_NV.data_ptr()
    losses_N = cross_entropy(own_NV, label_N, real=real, tp_group=dist.group.WORLD)
    assert losses_N.dtype == torch.float32
    # fp32 has 24 bits for log-sums up to 300.
    torch.testing.assert_close(losses_N.double(), exact_N, rtol=1e-5, atol=5e-5)
    losses_N.backward(grad_N, retain_graph=True)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    # Gradients are below one, computed in fp32 and rounded once to bf16's 8 bits.
    close = (
        {"rtol": 2.0**-8, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(
        leaf.grad[:, :real].double(), exact_NV.grad[:, first : first + real], **close
    )
    assert not leaf.grad[:, real:].any(), "columns that pad learn nothing"
    if world.size == 1:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses_N.backward(grad_N)
    assert own_NV.data_ptr() == memory


@pytest.mark.slow
@pytest.mark.parametrize("real", [0, 37, 40])
def test_compiled_functions_are_the_eager_ones(real: int):
    """On a CPU the compiler generates C++ from the graph that becomes a kernel on CUDA."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(N, 40, generator=generator).bfloat16()
    column_N = torch.randint(-5, 45, (N,), generator=generator)
    others = column_N, torch.randn(N, generator=generator).abs() + 4, torch.rand(N), real
    actual, wanted = logits_NV.clone(), logits_NV.clone()
    torch.compile(module.overwrite_with_gradients.__wrapped__)(actual, *others)
    module.overwrite_with_gradients(wanted, *others)
    torch.testing.assert_close(actual, wanted, rtol=2.0**-8, atol=1e-7)  # one bf16 rounding
    if real:
        for own, eager in zip(
            torch.compile(module._largest_and_sum.__wrapped__)(logits_NV, real),
            module._largest_and_sum(logits_NV, real),
            strict=True,
        ):
            torch.testing.assert_close(own, eager, rtol=1e-6, atol=0)  # fp32 in a different order
