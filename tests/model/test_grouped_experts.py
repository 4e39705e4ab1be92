"""Tests of grouped expert products against the loop and float64, and of their memory layout.

torch computes grouped products on a CPU as well, so everything but the kernel itself runs here.

Shape letters: T tokens, D hidden_size, M neurons of one expert, E experts.
"""

import shutil
from pathlib import Path

import pytest
import torch
from layouts import layout
from ranks import run_on_ranks
from tiny import save_dense
from torch import Tensor
from training_runs import run_training, tree, write_tokens

from megatron_moe.config.data import Data
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.run import Parallel, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.hf.spec import read_spec
from megatron_moe.model import grouped_experts, spec
from megatron_moe.model.experts import LoopExperts, apply_experts
from megatron_moe.model.grouped_experts import (
    ExpertKernel,
    GroupedExperts,
    expert_kernel,
    swiglu,
    swiglu_backward,
)
from megatron_moe.model.stacking import BackToFront, lay_out, stacked
from megatron_moe.runtime import gradients
from megatron_moe.runtime.engine import TORCH_ON_CPU, TORCH_ON_CUDA
from megatron_moe.runtime.world import World

D, M = 16, 24
COUNTS = [
    pytest.param((8, 8, 8, 8), id="balanced"),
    pytest.param((40, 1, 3, 20), id="skewed"),
    pytest.param((0, 9, 0, 0), id="empty-experts"),
    pytest.param((0, 0, 0, 0), id="no-tokens"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return tokens, routing weights, first and second weights; all representable in bf16."""
    tokens, experts = sum(counts), len(counts)
    weights = [random(2 * M, D, seed=2 * e) / 4 for e in range(experts)]
    weights += [random(D, M, seed=2 * e + 1) / 5 for e in range(experts)]
    values = [random(tokens, D, seed=90), random(tokens, seed=91).sigmoid(), *weights]
    values = [torch.nn.Parameter(value.bfloat16().to(dtype)) for value in values]
    lay_out(values[2 : 2 + experts])
    lay_out(values[2 + experts :])
    return values


def run(apply, counts: tuple[int, ...], values: list[Tensor], out_grad_TD: Tensor) -> list[Tensor]:
    """Return the output and the gradients of tokens, routing weights and weights."""
    experts = len(counts)
    out_TD = apply(values[0], values[1], counts, values[2 : 2 + experts], values[2 + experts :])
    grads = torch.autograd.grad(out_TD, values, out_grad_TD.to(values[0].dtype))
    return [out_TD.detach(), *grads]


def grouped(x_TD, prob_T, counts, fc1s, fc2s) -> Tensor:
    return grouped_experts.grouped_experts(x_TD, prob_T, torch.tensor(counts), fc1s, fc2s)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    # fp32: sums in a different order. bf16 has 8 bits: a few roundings of 2^-9 relative to the
    # largest value.
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 0.02)],
    ids=["fp32", "bf16"],
)
def test_grouped_products_are_the_loops_and_float64s(
    counts: tuple[int, ...], dtype: torch.dtype, tolerance: float
):
    out_grad_TD = random(sum(counts), D, seed=92).bfloat16()
    actual = run(grouped, counts, inputs(counts, dtype), out_grad_TD)
    loop = run(apply_experts, counts, inputs(counts, dtype), out_grad_TD)
    exact = run(apply_experts, counts, inputs(counts, torch.float64), out_grad_TD)
    for own, loops, wanted in zip(actual, loop, exact, strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        assert own.dtype == dtype
        for other in (loops, wanted):
            torch.testing.assert_close(
                own.double(), other.double(), rtol=0, atol=tolerance * scale + 1e-30
            )


@pytest.mark.parametrize("one_storage", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_weight_gradients_are_added_to_main_grad(counts: tuple[int, ...], one_storage: bool):
    """Run two steps of two micro-batches. The first product of the second step overwrites."""
    values = inputs(counts, torch.bfloat16)
    out_grad_TD = random(sum(counts), D, seed=92).bfloat16()
    wanted = run(grouped, counts, values, out_grad_TD)[3:]
    for shape, weights in (((2 * M, D), values[2:6]), ((D, M), values[6:])):
        whole = torch.zeros(len(counts), *shape)
        rows = whole.unbind() if one_storage else [row.clone() for row in whole]
        for weight, row in zip(weights, rows, strict=True):
            weight.main_grad = row
    for step in range(2):
        for weight in values[2:]:
            if step:
                weight.main_grad.fill_(torch.nan)
                weight.main_grad.stale = True
        for _ in range(2):
            run(grouped, counts, values, out_grad_TD)
    for weight, gradient in zip(values[2:], wanted, strict=True):
        assert weight.grad_added_to_main_grad
        assert torch.equal(weight.main_grad, 2 * gradient.float())


def test_an_expert_without_tokens_counts_as_zero_whatever_its_product_holds():
    """Simulate compute capability 10.0, whose kernel does not write empty groups."""
    main_grad, product = torch.ones(2, 1, 2), torch.tensor([[[1.0, 2.0]], [[torch.nan] * 2]])
    used_E11 = torch.tensor([True, False])[:, None, None]
    grouped_experts._accumulate(main_grad, product, used_E11, False)
    assert main_grad.flatten().tolist() == [2.0, 3.0, 1.0, 1.0]
    grouped_experts._accumulate(main_grad, product, used_E11, True)
    assert main_grad.flatten().tolist() == [1.0, 2.0, 0.0, 0.0]


def test_what_autograd_gets_for_main_grad_is_one_small_tensor():
    """Autograd may keep a gradient; a copy of each would be as large as all weights."""
    values = inputs((3, 4, 5), torch.bfloat16)
    for weight in values[2:]:
        weight.main_grad = torch.zeros(weight.shape)
    grouped(values[0], values[1], (3, 4, 5), values[2:5], values[5:]).sum().backward()
    starts = {weight.grad.data_ptr() for weight in values[2:5]}
    assert len(starts) == 1


def test_swiglus_gradients_are_autograds():
    h_T2M, prob_T = random(5, 2 * M).requires_grad_(), random(5, seed=1).requires_grad_()
    grad_TM = random(5, M, seed=2)
    out_TM = swiglu(h_T2M, prob_T)
    wanted = torch.autograd.grad(out_TM, (h_T2M, prob_T), grad_TM)
    act_TM, *actual = swiglu_backward(h_T2M.detach(), prob_T.detach(), grad_TM)
    for own, autograds in zip((act_TM, *actual), (out_TM, *wanted), strict=True):
        torch.testing.assert_close(own, autograds, rtol=1e-5, atol=1e-6)  # fp32


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({}, "grouped_mm", "bf16 on compute capability 9.0"),
        ({"capability": (10, 3)}, "grouped_mm", "10.3"),
        ({"capability": None}, "loop", "no CPU kernel"),
        ({"capability": (8, 0)}, "loop", "compute capability 8.0"),
        ({"capability": (12, 0)}, "loop", "compute capability 12.0"),
        ({"dtype": torch.float32}, "loop", "not torch.float32"),
        ({"sizes": (64, 12)}, "loop", "16-byte aligned"),
        ({"stackable": False}, "loop", "equal distances"),
    ],
)
def test_the_kernel_and_its_reason(changes: dict, name: str, reason: str):
    usual = {"capability": (9, 0), "dtype": torch.bfloat16, "sizes": (64, 96), "stackable": True}
    kernel = expert_kernel(**{**usual, **changes})
    assert kernel.name == name
    assert reason in kernel.reason


def test_tensors_at_equal_distances_are_one_view():
    buffer = torch.arange(100.0)
    rows = [buffer[start : start + 6].view(2, 3) for start in (4, 24, 44)]
    view = stacked(rows)
    assert view is not None
    assert view.data_ptr() == rows[0].data_ptr()
    assert torch.equal(view, torch.stack(rows))
    assert stacked(rows[:1]) is not None
    for reason, tensors in {
        "descending": rows[::-1],
        "unequal distances": [rows[0], rows[2], buffer[60:66].view(2, 3)],
        "overlapping": [buffer[0:6], buffer[4:10]],
        "not aligned": [buffer[1:7], buffer[21:27]],
        "other storages": [row.clone() for row in rows],
    }.items():
        assert stacked(tensors) is None, reason


def test_equal_distances_across_storages_are_no_view():
    """Allocators may place separate tensors at equal distances."""
    buffer = torch.arange(64.0)
    halves = []
    for start in (0, 32):
        storage = buffer[start : start + 32].numpy()  # one block of memory, in two storages
        halves.append(torch.from_numpy(storage))
    assert halves[1].data_ptr() - halves[0].data_ptr() == 128
    assert stacked(halves) is None


def test_modules_registered_back_to_front_keep_names_and_order():
    modules = [torch.nn.Linear(2, 2) for _ in range(12)]
    plain, ours = torch.nn.ModuleList(modules), BackToFront(modules)
    assert list(ours) == list(plain)
    assert [ours[index] for index in range(12)] == modules
    assert len(ours) == 12
    assert dict(ours.named_parameters()) == dict(plain.named_parameters())
    assert list(dict(ours.named_children())) == [str(index) for index in reversed(range(12))]


@pytest.mark.slow
def test_compiled_functions_are_the_eager_ones():
    """On a CPU the compiler generates C++ from the graph that becomes a kernel on CUDA."""
    h_T2M, prob_T, grad_TM = random(7, 2 * M).bfloat16(), random(7), random(7, M).bfloat16()
    for function, arguments in (
        (swiglu, (h_T2M, prob_T)),
        (swiglu_backward, (h_T2M, prob_T, grad_TM)),
    ):
        eager = function(*arguments)
        compiled = torch.compile(function.__wrapped__)(*arguments)
        torch.testing.assert_close(compiled, eager, rtol=2**-8, atol=1e-5)  # one bf16 rounding
    main, product = random(3, 4, 5), random(3, 4, 5, seed=1).bfloat16()
    used_E11 = torch.tensor([True, False, True])[:, None, None]
    accumulate = grouped_experts._accumulate
    for first in (False, True):
        own, wanted = main.clone(), main.clone()
        torch.compile(accumulate.__wrapped__)(own, product, used_E11, first)
        accumulate(wanted, product, used_E11, first)
        assert torch.equal(own, wanted)


@pytest.mark.distributed
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_data_parallelism_lays_experts_out_as_one_view(tmp_path: Path, distributed_optimizer: bool):
    run_on_ranks(check_buffers, save_dense(tmp_path), distributed_optimizer, world_size=1)


def check_buffers(world: World, folder: Path, distributed_optimizer: bool) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups

    config = RunConfig(
        run=Run(dir=folder),
        source=Source(path=folder),
        moe=Moe(num_moe_experts=12, moe_layers=[0, 2]),
        data=Data(path=folder, seq_length=8),
        train=Train(steps=0, precision="bf16"),
    )
    places, groups = create_groups(Parallel(), seed=0)
    dense = read_spec(folder)
    models = []
    for engine in (TORCH_ON_CPU, TORCH_ON_CUDA):
        model = build_model(config, dense, layout=places, groups=groups, rank=0, engine=engine)
        models.append(model.modules[0])
    plain, ours = models
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes
    assert ours.sharded_state_dict().keys() == plain.sharded_state_dict().keys()
    for index, name in enumerate(shapes):
        for module in models:
            module.get_parameter(name).data.copy_(random(*shapes[name], seed=index) / 8)
    layers = [m for m in ours.modules() if isinstance(m, GroupedExperts)]
    assert len(layers) == 2
    grouped_experts.lay_out_experts([ours])
    for layer in layers:
        for weights in layer.weights():
            assert torch.equal(stacked(weights), torch.stack(weights))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name

    wrapped = DistributedDataParallel(
        config=ours.config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True
        ),
        module=ours,
        pg_collection=groups,
    )
    assert len(list(wrapped.parameters())) == len(shapes)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    for layer in layers:
        for weights in layer.weights():
            view = stacked(weights)
            assert view is not None
            assert torch.equal(view, torch.stack(weights))
            assert stacked([weight.main_grad for weight in weights]) is not None
        assert layer.kernel() == ExpertKernel("loop", "there is no CPU kernel for grouped products")
    check_a_pass(plain, layers)
    gradients.zero_stale(ours.parameters())


def check_a_pass(plain: torch.nn.Module, layers: list[GroupedExperts]) -> None:
    """Compare the first layer's output and main_grad with the loop and separate gradients."""
    counts = (3, 0, 5, 1, 0, 0, 7, 2, 1, 1, 0, 4)
    (loop_layer, *_) = [m for m in plain.modules() if type(m) is LoopExperts]
    x_TD, prob_T = random(sum(counts), 64).bfloat16(), random(sum(counts), seed=1).sigmoid()
    wanted_TD, _ = loop_layer(x_TD, torch.tensor(counts), prob_T)
    wanted_TD.float().sum().backward()
    out_TD = grouped(x_TD, prob_T, counts, *layers[0].weights())
    out_TD.float().sum().backward()
    torch.testing.assert_close(
        out_TD, wanted_TD, rtol=0.02, atol=0.02 * float(wanted_TD.abs().max())
    )
    for name, parameter in layers[0].named_parameters():
        wanted = loop_layer.get_parameter(name).grad.float()
        torch.testing.assert_close(
            parameter.main_grad, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()) + 1e-30
        )


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [("dp2 ep2", "dp2 ep2"), ("1", "dp4 ep2")])
def test_a_run_resumes_with_grouped_products(
    tmp_path: Path, before: str, after: str, monkeypatch: pytest.MonkeyPatch
):
    """Resume a run that used the loop with grouped products, in fp32 on a CPU.

    Weights are one view in data parallelism's buffers, or the run ends.
    """
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")

    def settings(name: str, where: str) -> dict:
        return tree(
            tmp_path / where, dense, tokens, parallel=layout(name)[1],
            train={"steps": 4, "micro_batch_size": 1}, checkpoint={"interval": 2},
        )  # fmt: skip

    wanted = run_training(settings(before, "loop"), world_size=layout(before)[0])
    shutil.copytree(tmp_path / "loop", tmp_path / "grouped")
    (tmp_path / "grouped" / "checkpoints" / "latest").write_text("step_00000002\n")

    def kernel(*, stackable: bool, **_: object) -> ExpertKernel:
        assert stackable
        return ExpertKernel("grouped_mm", "a test")

    monkeypatch.setattr(grouped_experts, "expert_kernel", kernel)
    monkeypatch.setattr(spec, "LoopExperts", GroupedExperts)
    actual = run_training(settings(after, "grouped"), world_size=layout(after)[0])

    assert [line["step"] for line in actual] == [0, 1, 2, 3, 4]
    for own, loops in zip(actual[3:], wanted[3:], strict=True):  # tolerance as between layouts
        assert own["loss/lm"] == pytest.approx(loops["loss/lm"], rel=1e-5)
        assert own["grad_norm"] == pytest.approx(loops["grad_norm"], rel=1e-4)
