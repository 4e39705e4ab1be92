"""The losses of a teacher and their gradients, against float64 and autograd.

Shape letters: N tokens, V vocabulary, E experts, D hidden_size, F dense neurons, M neurons of an
expert, B sequences, S positions (s: of one rank).
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from ranks import run_on_ranks

from megatron_moe.experts.plan import LayerPlan
from megatron_moe.model.distillation import (
    Vocabulary,
    taught_cross_entropy,
    toward_output,
    toward_shares,
)
from megatron_moe.model.teacher_ffn import TeacherFfn
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.runtime.world import World

N = 12
CASES = [
    pytest.param(500, 1, 1.0, id="V500-tp1"),
    pytest.param(500, 2, 2.0, id="V500-tp2-T2"),
    pytest.param(7, 2, 0.5, id="V7-tp2-one-column-of-padding"),
    pytest.param(5, 4, 1.0, id="V5-tp4-a-rank-of-padding-only"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocab_size", "tp", "temperature"), CASES)
def test_losses_and_gradients_are_float64s(
    vocab_size: int, tp: int, temperature: float, dtype: torch.dtype
):
    run_on_ranks(check_logits, vocab_size, temperature, dtype, world_size=tp)


def check_logits(world: World, vocab_size: int, temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    width = padded_vocabulary(vocab_size, world.size) // world.size
    own = slice(world.rank * width, (world.rank + 1) * width)
    real = max(min(vocab_size - own.start, width), 0)
    both = torch.randn(2, N, width * world.size, generator=generator) * 4
    both[:, 0] += 300  # exponentials of unshifted logits would overflow
    both[:, :, vocab_size:] = 1000.0  # padding is the largest, so counting it would show
    logits_NV, teacher_NV = both.to(dtype)
    label_N = torch.randint(0, vocab_size, (N,), generator=generator)
    grads = torch.rand(2, N, generator=generator)

    exact_NV = logits_NV[:, :vocab_size].double().requires_grad_()
    taught_NV = teacher_NV[:, :vocab_size].double()
    cross_entropy_N = F.cross_entropy(exact_NV, label_N, reduction="none")
    divergence_N = F.kl_div(
        (exact_NV / temperature).log_softmax(dim=1),
        (taught_NV / temperature).log_softmax(dim=1),
        log_target=True,
        reduction="none",
    ).sum(dim=1)
    expected = torch.stack([cross_entropy_N, temperature**2 * divergence_N])
    expected.backward(grads.double())
    assert exact_NV.grad is not None

    leaf = logits_NV[:, own].clone().requires_grad_()
    losses = taught_cross_entropy(
        leaf.clone(), teacher_NV[:, own].contiguous(), label_N, temperature=temperature,
        vocabulary=Vocabulary(real, dist.group.WORLD),
    )  # fmt: skip
    assert losses[0].dtype == losses[1].dtype == torch.float32
    # fp32 has 24 bits for log-sums up to 300 / T, of which the divergence is a difference.
    size = 300 * max(1.0, 1 / temperature) * max(1.0, temperature**2)
    for loss_N, exact_N in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss_N.double(), exact_N, rtol=1e-5, atol=2e-7 * size)
    torch.stack(losses).backward(grads)
    assert leaf.grad is not None
    # Gradients are at most max(1, T), computed in fp32 and rounded once to bf16's 8 bits.
    close = {"rtol": 2.0**-8 if dtype == torch.bfloat16 else 1e-4, "atol": 2e-4}
    torch.testing.assert_close(
        leaf.grad[:, :real].double(), exact_NV.grad[:, own.start : own.start + real], **close
    )
    assert not leaf.grad[:, real:].any(), "columns that pad learn nothing"


def test_equal_logits_diverge_by_nothing():
    logits_NV = torch.randn(N, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label_N = torch.arange(N)

    def both(world: World) -> None:
        vocabulary = Vocabulary(50, dist.group.WORLD)
        _, divergence_N = taught_cross_entropy(
            logits_NV.clone(), logits_NV.detach(), label_N, temperature=1.0, vocabulary=vocabulary
        )
        assert divergence_N.abs().max() < 1e-6
        divergence_N.sum().backward()
        assert logits_NV.grad is not None
        assert logits_NV.grad.abs().max() < 1e-6

    run_on_ranks(both, world_size=1)


def test_toward_output_adds_the_gradient_of_the_relative_error():
    generator = torch.Generator().manual_seed(0)
    output, target, other = torch.randn(3, 5, 2, 8, generator=generator, dtype=torch.float64)
    exact = output.clone().requires_grad_()
    error_SB = ((exact - target) ** 2).sum(dim=-1) / (target**2).sum(dim=-1)
    ((exact * other).sum() + 0.3 * error_SB.sum()).backward()

    leaf = output.clone().requires_grad_()
    result, errors = toward_output(leaf, target, 0.3)
    assert torch.equal(result, output), "the value of the output does not change"
    (result * other).sum().backward()
    torch.testing.assert_close(errors.double(), error_SB.detach(), rtol=1e-5, atol=0)  # fp32
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_an_output_of_zero_gives_finite_gradients():
    leaf = torch.ones(1, 1, 4, requires_grad=True)
    result, error = toward_output(leaf, torch.zeros(1, 1, 4), 1.0)
    result.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(error).all()
    assert torch.isfinite(leaf.grad).all()


def test_toward_shares_adds_the_gradient_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, N, 4, generator=generator, dtype=torch.float64)
    share = torch.rand(N, 4, generator=generator, dtype=torch.float64)
    share[0] = torch.tensor([1.0, 0, 0, 0])  # 0 log 0 is 0
    share /= share.sum(dim=1, keepdim=True)
    exact = logits.clone().requires_grad_()
    divergence_N = F.kl_div(exact.log_softmax(dim=1), share, reduction="none").sum(dim=1)
    ((exact * other).sum() + 0.3 * divergence_N.sum()).backward()

    leaf = logits.clone().requires_grad_()
    result, divergences = toward_shares(leaf, share, 0.3)
    assert torch.equal(result, logits)
    (result * other).sum().backward()
    torch.testing.assert_close(divergences.double(), divergence_N.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-5, atol=1e-6)


# ---- shares of experts ---------------------------------------------------------------------------

D, NEURONS, EXPERTS = 8, 12, 3


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2])
def test_outputs_and_shares_are_those_of_each_expert_alone(tp: int):
    run_on_ranks(check_shares, world_size=tp)


def check_shares(world: World) -> None:
    """The oracle computes each expert's own output in float64."""
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD = torch.randn(2, NEURONS, D, generator=generator)
    down_DF = torch.randn(D, NEURONS, generator=generator)
    x_SBD = torch.randn(4, 2, D, generator=generator)
    neurons_EM = torch.randperm(NEURONS, generator=generator)[:9].view(EXPERTS, 3)  # 3 are shared

    act = F.silu(x_SBD.double() @ gate_FD.double().T) * (x_SBD.double() @ up_FD.double().T)
    output = act @ down_DF.double().T
    own = torch.stack([act[..., n] @ down_DF[:, n].double().T for n in neurons_EM], dim=-2)
    share = torch.einsum("sbed,sbd->sbe", own, output).clamp_min(0)
    share /= share.sum(dim=-1, keepdim=True)
    assert (share == 0).any(), "some contribution points the other way"

    part = slice(world.rank * NEURONS // world.size, (world.rank + 1) * NEURONS // world.size)
    ffn = TeacherFfn(
        torch.cat([gate_FD[part], up_FD[part]]), down_DF[:, part].contiguous(),
        plan_of(neurons_EM), dist.group.WORLD,
    )  # fmt: skip
    rows = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    x_sBD = x_SBD[rows]
    ffn.expect(None, (x_sBD,))
    torch.testing.assert_close(ffn.shares(x_sBD).double(), share[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ffn.output(x_sBD).double(), output[rows], rtol=1e-4, atol=1e-4)
    ffn.forget()
    other = ffn.output(-x_sBD)
    assert not torch.allclose(other, ffn.output(x_sBD)), "results belong to their input"


def plan_of(neurons_EM: torch.Tensor) -> LayerPlan:
    return LayerPlan(
        neurons_EM=neurons_EM.numpy(), shared_S=neurons_EM.numpy()[:0, 0],
        source_E=neurons_EM.numpy()[:, 0] * 0, expert_E=None, merge=None,
        reinit_EM=None, reinit_S=None,
        weight_scales=(1.0, 1.0, 1.0), output_scale=1.0, router_ED=None,
    )  # fmt: skip


def test_the_planner_counts_what_the_ffn_computes():
    run_on_ranks(check_flops, world_size=1)


def check_flops(world: World) -> None:
    """Torch's own counter; it also counts the product that sums neurons over experts."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_moe.planner.shape import MoeShape
    from megatron_moe.planner.teacher import teacher_flops
    from megatron_moe.planner.workload import TeacherWork

    student = MoeShape(
        num_layers=1, moe_layers=frozenset({0}), hidden_size=D, ffn_hidden_size=NEURONS,
        num_attention_heads=1, num_query_groups=1, kv_channels=D, vocab_size=10,
    )  # fmt: skip
    neurons_EM = torch.arange(NEURONS).view(EXPERTS, -1)
    ffn = TeacherFfn(
        torch.randn(2 * NEURONS, D), torch.randn(D, NEURONS), plan_of(neurons_EM), dist.group.WORLD
    )
    x_SBD, sums = torch.randn(6, 1, D), 2 * 6 * NEURONS * EXPERTS
    for router, compute in ((False, ffn.output), (True, ffn.shares)):
        with FlopCounterMode(display=False) as counter:
            compute(x_SBD)
        work = TeacherWork(shape=student, logits=False, layers=not router, router=router)
        planned = teacher_flops(work, student, sequence_length=6)
        assert counter.get_total_flops() == planned.causal + sums * router
