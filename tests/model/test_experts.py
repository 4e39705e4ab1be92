"""Tests of a rank's experts against float64 algebra and Megatron-Core's SequentialMLP.

Shape letters: T tokens, D hidden_size, M neurons of one expert.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks
from tiny import save_dense
from torch import Tensor

from megatron_moe.config.data import Data
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.run import Parallel, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.hf.spec import read_spec
from megatron_moe.model.experts import LoopExperts, apply_experts
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

T, D, M = 9, 6, 5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def swiglu(x_TD: Tensor, prob_T: Tensor, fc1_2MD: Tensor, fc2_DM: Tensor) -> Tensor:
    """Apply one expert to all tokens."""
    return apply_experts(x_TD, prob_T, [len(x_TD)], [fc1_2MD], [fc2_DM])


def by_hand(x_TD: Tensor, prob_T: Tensor, fc1_2MD: Tensor, fc2_DM: Tensor) -> Tensor:
    """Compute ``prob * sum(down * silu(gate x) * up x)`` neuron by neuron."""
    out_TD = torch.zeros_like(x_TD)
    size = len(fc1_2MD) // 2
    for m in range(size):
        gate_T, up_T = x_TD @ fc1_2MD[m], x_TD @ fc1_2MD[size + m]
        h_T = gate_T / (1 + (-gate_T).exp()) * up_T
        out_TD += h_T[:, None] * fc2_DM[:, m] * prob_T[:, None]
    return out_TD


def experts(count: int) -> SimpleNamespace:
    """Weights and hooks that `LoopExperts.forward` reads. The layers are never called."""

    def linear(*shape: int, seed: int) -> SimpleNamespace:
        weight = random(*shape, seed=seed).requires_grad_()
        return SimpleNamespace(weight=weight, _forward_pre_hooks={})

    return SimpleNamespace(
        local_experts=[
            SimpleNamespace(
                linear_fc1=linear(2 * M, D, seed=2 * e), linear_fc2=linear(D, M, seed=2 * e + 1)
            )
            for e in range(count)
        ]
    )


def test_swiglu_is_the_sum_over_its_neurons():
    weights = random(T, D), random(T, seed=1).sigmoid(), random(2 * M, D, seed=2), random(D, M)
    torch.testing.assert_close(swiglu(*weights), by_hand(*weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [(3, 4, 2), (0, 9, 0), (9, 0, 0)], ids=str)
def test_each_expert_takes_its_run_of_tokens(counts: tuple[int, ...]):
    these = experts(3)
    x_TD, prob_T = random(T, D, seed=8), random(T, seed=9).sigmoid()
    out_TD, bias = LoopExperts.forward(these, x_TD, torch.tensor(counts), prob_T)
    assert bias is None
    expert_of = [e for e, count in enumerate(counts) for _ in range(count)]
    for t, e in enumerate(expert_of):
        expert = these.local_experts[e]
        one = by_hand(
            x_TD[t : t + 1], prob_T[t : t + 1], expert.linear_fc1.weight, expert.linear_fc2.weight
        )
        torch.testing.assert_close(out_TD[t : t + 1], one, rtol=1e-12, atol=1e-12)


def test_a_gather_of_weights_is_finished_before_they_are_read():
    """Each hook that data parallelism registers on the layers runs once."""
    these, awaited = experts(2), []
    for expert in these.local_experts:
        for linear in (expert.linear_fc1, expert.linear_fc2):
            linear.weight.data.zero_()

            def hook(module: SimpleNamespace, *_: object) -> None:
                awaited.append(module)
                module.weight.data.fill_(1.0)

            linear._forward_pre_hooks[0] = hook
    out_TD, _ = LoopExperts.forward(these, random(3, D), torch.tensor([1, 2]), random(3))
    assert len(awaited) == 4
    assert out_TD.all(), "the weights that came are used"


@pytest.mark.parametrize("counts", [(0, 9), (0, 0)], ids=["one-empty", "all-empty"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(counts: tuple[int, ...]):
    """With None this rank would miss the collectives that the others enter."""
    these = experts(2)
    tokens = sum(counts)
    out, _ = LoopExperts.forward(
        these, random(tokens, D), torch.tensor(counts), random(tokens).sigmoid()
    )
    assert out.shape == (tokens, D)
    out.sum().backward()
    for expert, count in zip(these.local_experts, counts, strict=True):
        for linear in (expert.linear_fc1, expert.linear_fc2):
            assert linear.weight.grad is not None
            assert bool(linear.weight.grad.any()) == (count > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp32_routing_weights_do_not_change_the_models_precision(dtype: torch.dtype):
    x_TD, fc1, fc2 = (random(*s, dtype=torch.float32).to(dtype) for s in ((T, D), (8, D), (D, 4)))
    assert swiglu(x_TD, random(T, dtype=torch.float32), fc1, fc2).dtype == dtype


@pytest.mark.parametrize("counts", [(40, 1, 0, 90), (33, 31, 64, 3), (40, 9, 5, 0)], ids=str)
def test_rows_that_bf16_rounds_up_leave_no_trace(counts: tuple[int, ...]):
    """A bf16 expert also multiplies some of the next one's tokens; they must not affect results."""
    tokens = sum(counts)
    x_TD, prob_T, out_grad_TD = random(tokens, D), random(tokens, seed=1), random(tokens, D, seed=2)
    fc1s = [random(2 * M, D, seed=2 * e) for e in range(4)]
    fc2s = [random(D, M, seed=2 * e + 1) for e in range(4)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):  # the same numbers, representable in bf16
        values = [v.bfloat16().to(dtype).requires_grad_() for v in (x_TD, prob_T, *fc1s, *fc2s)]
        out_TD = apply_experts(values[0], values[1], counts, values[2:6], values[6:])
        grads = torch.autograd.grad(out_TD, values, out_grad_TD.bfloat16().to(dtype))
        results.append([out_TD, *grads])
    for actual, exact in zip(*results, strict=True):  # bf16 has 8 bits: a few roundings of 2^-9
        scale = float(exact.detach().abs().max()) if exact.numel() else 1.0
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=0.02 * scale + 1e-30)


def test_its_gradients_are_those_of_finite_differences():
    values = random(T, D), random(T, seed=1).sigmoid(), random(2 * M, D, seed=2), random(D, M)
    assert torch.autograd.gradcheck(swiglu, [value.requires_grad_() for value in values])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weight_gradients_are_added_where_data_parallelism_keeps_them(dtype: torch.dtype):
    values = [
        value.to(dtype).requires_grad_()
        for value in (random(T, D), random(T, seed=1), random(2 * M, D, seed=2), random(D, M))
    ]
    out_grad_TD = random(T, D, seed=3).to(dtype)
    wanted = torch.autograd.grad(swiglu(*values), values, out_grad_TD)
    buffers = [torch.ones(value.shape, dtype=torch.float64) for value in values[2:]]
    for weight, buffer in zip(values[2:], buffers, strict=True):
        weight.main_grad = buffer  # type: ignore[attr-defined]
    for _ in range(2):
        actual = torch.autograd.grad(swiglu(*values), values, out_grad_TD)
    for weight, buffer, gradient in zip(values[2:], buffers, wanted[2:], strict=True):
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(buffer, 1 + 2 * gradient.double(), rtol=1e-12, atol=1e-12)
    for gradient, again in zip(wanted[:2], actual[:2], strict=True):
        assert torch.equal(gradient, again)


@pytest.mark.distributed
def test_the_lean_forward_is_megatrons(tmp_path: Path):
    """Compare output and gradients with Megatron-Core's SequentialMLP and the same weights."""
    run_on_ranks(check_against_megatron, save_dense(tmp_path), world_size=1)


def check_against_megatron(world: World, folder: Path) -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups

    config = RunConfig(
        run=Run(dir=folder),
        source=Source(path=folder),
        moe=Moe(num_moe_experts=3, moe_layers=[0]),
        data=Data(path=folder, seq_length=8),
        train=Train(steps=0, precision="fp32"),
    )
    layout, groups = create_groups(Parallel(), seed=0)
    spec = read_spec(folder)
    model = build_model(config, spec, layout=layout, groups=groups, rank=0, engine=TORCH_ON_CPU)
    ours = model.modules[0].decoder.layers[0].mlp.experts
    assert type(ours) is LoopExperts
    for index, parameter in enumerate(ours.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=index) * 0.2)
    counts = torch.tensor([4, 0, 5])
    results = []
    for forward in (LoopExperts.forward, SequentialMLP.forward):
        x_TD = random(9, spec.hidden_size, seed=50).float().requires_grad_()
        prob_T = random(9, seed=51).sigmoid().float().requires_grad_()
        ours.zero_grad()
        out_TD, _ = forward(ours, x_TD, counts, prob_T)
        out_TD.backward(random(9, spec.hidden_size, seed=52).float())
        gradients = [x_TD.grad, prob_T.grad, *(p.grad.clone() for p in ours.parameters())]
        results.append([out_TD.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
