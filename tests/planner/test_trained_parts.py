"""Frozen roles and Muon in a predicted step: what is left out, and what is added."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe.config.parts import Frozen
from megatron_moe.hf.names import ROLES
from megatron_moe.planner.calibration import FITTED
from megatron_moe.planner.flops import sequence_flops
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.orthogonalization import matrix_flops, orthogonalization_flops
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, Workload

MACHINE = Machine(gpu_named("h100"), FITTED)
WORK = Workload(sequence_length=4096, global_batch_size=64)
LAYOUTS = [Degrees(gpus=8), Degrees(gpus=16, tp=2, pp=2, ep=4)]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("role", ["attention", "experts", "embeddings", "norms", "experts@0-9"])
def test_a_frozen_role_saves_its_gradients(llama3_e8t2: MoeShape, degrees: Degrees, role: str):
    """Time falls; MFU times time and peak gives back the operations that are left."""
    work = replace(WORK, frozen=Frozen.named([role]))
    frozen, whole = (step_time(llama3_e8t2, w, degrees, MACHINE) for w in (work, WORK))
    assert frozen.step_seconds < whole.step_seconds
    assert frozen.parts["optimizer"] < whole.parts["optimizer"]
    peak = degrees.gpus * MACHINE.gpu.peak_flops / 100
    counted = frozen.mfu * frozen.step_seconds * peak / WORK.global_batch_size
    expected = sequence_flops(llama3_e8t2, WORK.sequence_length, work.frozen).causal
    assert counted == pytest.approx(expected, rel=1e-9)
    for name in set(frozen.parts) - {"gemm", "output_layer", "bubble", "dp", "optimizer"}:
        assert frozen.parts[name] == whole.parts[name], name


def test_the_more_is_frozen_the_faster_is_a_step(llama3_e8t2: MoeShape):
    seconds = [
        step_time(llama3_e8t2, replace(WORK, frozen=frozen), LAYOUTS[1], MACHINE).step_seconds
        for frozen in (Frozen.named(list(ROLES)[:count]) for count in range(len(ROLES)))
    ]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 40), (40, 16), (1, 8)])
def test_an_orthogonalization_is_counted_as_torch_counts_it(rows: int, columns: int):
    """The oracle is torch's counter around the function that Megatron-Core calls."""
    utils = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        utils.newton_schulz(matrix, 5)
    assert counter.get_total_flops() == matrix_flops(rows, columns)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_muon_takes_the_time_of_its_products(llama3_e8t2: MoeShape, degrees: Degrees):
    muon, adam = (
        step_time(llama3_e8t2, replace(WORK, optimizer=name), degrees, MACHINE)
        for name in ("muon", "adam")
    )
    extra = muon.parts["optimizer"] - adam.parts["optimizer"]
    flops = orthogonalization_flops(llama3_e8t2, degrees)
    speed = MACHINE.gpu.peak_flops * FITTED.gemm_efficiency
    assert extra == pytest.approx(flops / speed)
    assert muon.mfu < adam.mfu, "the optimizer's products are not the model's"
    assert 1 < muon.parts["dp"] / adam.parts["dp"] < 2, (
        "gradients are reduced whole, weights are not"
    )


def test_the_matrices_of_all_ranks_are_those_of_the_model(llama3_e8t2: MoeShape):
    """By hand: 32 layers with q and o, k and v, 8 experts of three matrices, and a router."""
    d, f = 4096, 14336
    layer = 2 * matrix_flops(d, d) + 2 * matrix_flops(1024, d)
    layer += 8 * 3 * matrix_flops(f, d) + matrix_flops(8, d)
    one = orthogonalization_flops(llama3_e8t2, Degrees(gpus=1))
    assert one == 32 * layer
    spread = orthogonalization_flops(llama3_e8t2, Degrees(gpus=16, pp=2, ep=8))
    assert 16 * spread == pytest.approx(one)
    without_experts = Frozen.named(["experts"])
    assert orthogonalization_flops(llama3_e8t2, Degrees(gpus=1), without_experts) < one / 10
    rest = orthogonalization_flops(llama3_e8t2, Degrees(gpus=1), Frozen.named(["attention@8-31"]))
    assert one - rest == 24 * (2 * matrix_flops(d, d) + 2 * matrix_flops(1024, d))


def test_frozen_layers_save_their_part_of_a_roles_gradients(llama3_e8t2: MoeShape):
    """A role frozen in all of its layers is the role frozen; in half of them, half of it."""

    def seconds(*names: str) -> float:
        work = replace(WORK, frozen=Frozen.named(names))
        return step_time(llama3_e8t2, work, LAYOUTS[0], MACHINE).parts["gemm"]

    none, whole = seconds(), seconds("experts")
    assert seconds("experts@0-31") == pytest.approx(whole)
    assert seconds("experts@0-15") == pytest.approx((none + whole) / 2)
