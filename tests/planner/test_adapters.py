"""Adapters in the planner: operations as torch counts them, time, and the changes they allow."""

from dataclasses import replace

import pytest
import torch
from dense_models import H100_FILES, shipped
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe.config.load import overridden
from megatron_moe.config.parts import Frozen, Role
from megatron_moe.planner.calibration import FITTED
from megatron_moe.planner.check import check_layout
from megatron_moe.planner.flops import forward_flops, step_flops
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, Workload

SHAPE = MoeShape(
    num_layers=3, moe_layers=frozenset({0, 2}), hidden_size=32, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=16, vocab_size=64,
    num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24,
)  # fmt: skip
ATTENTION: tuple[Role, ...] = ("attention",)
BOTH: tuple[Role, ...] = ("attention", "experts")
ONE_GPU = next(path for path in H100_FILES if path.stem == "llama3.2-1b-e4t2-1")


def counted(*sizes: tuple[int, int], tokens: int, rank: int, trained: bool) -> int:
    """Return torch's count of the products of adapters for weights of these inputs and outputs."""
    total = 0
    for inputs, outputs in sizes:
        layers = (torch.nn.Linear(inputs, rank), torch.nn.Linear(rank, outputs))
        for layer in layers:
            layer.requires_grad_(trained)
        x = torch.randn(tokens, inputs, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            torch.nn.Sequential(*layers)(x).sum().backward()
        total += counter.get_total_flops()
    return total


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, BOTH])
def test_operations_of_a_step_are_those_that_torch_counts(targets: tuple[Role, ...], trained: bool):
    """16 tokens; each goes to two experts. The frozen weights have no gradients."""
    adapted = replace(SHAPE, lora_rank=5, lora_targets=targets)
    frozen = Frozen.named([*targets, *([] if trained else ["adapters"])])
    ours, theirs = (
        step_flops(shape, forward_flops(shape, sequence_length=16), frozen)
        for shape in (adapted, SHAPE)
    )
    expected = 3 * counted((32, 64 + 2 * 32), (64, 32), tokens=16, rank=5, trained=trained)
    if "experts" in targets:
        expected += 2 * counted((32, 2 * 24), (24, 32), tokens=32, rank=5, trained=trained)
    assert ours - theirs == expected


@pytest.mark.parametrize("degrees", [Degrees(gpus=8), Degrees(gpus=16, tp=2, pp=2, ep=4)], ids=str)
def test_a_larger_rank_takes_longer_and_less_than_the_weights(
    llama3_e8t2: MoeShape, degrees: Degrees
):
    machine = Machine(gpu_named("h100"), FITTED)
    work = Workload(sequence_length=4096, global_batch_size=64)
    frozen = replace(work, frozen=Frozen(frozenset(BOTH)))
    shapes = [replace(llama3_e8t2, lora_rank=rank, lora_targets=BOTH) for rank in (0, 8, 64)]
    times = [step_time(shape, frozen, degrees, machine) for shape in shapes]
    seconds = [time.step_seconds for time in times]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 3
    whole = step_time(llama3_e8t2, work, degrees, machine)
    assert times[1].parts["optimizer"] < whole.parts["optimizer"] / 10
    assert sum(times[2].parts.values()) == pytest.approx(times[2].step_seconds)


@pytest.mark.parametrize("gpu", ["rtx4090", "l40s"])
def test_adapters_are_among_the_changes_that_fit_one_small_gpu(gpu: str):
    config, spec, _ = shipped(ONE_GPU)
    lines = [line for line in check_layout(config, spec, gpus=1, gpu=gpu).reliefs if "lora" in line]
    assert any("lora.targets=[attention,experts]" in line for line in lines)
    assert any("train.freeze=[experts] lora.rank=16" in line for line in lines)
    for line in lines:
        changed = overridden(config, line.split(":")[0].split())
        result = check_layout(changed, spec, gpus=1, gpu=gpu)
        assert result.fits, line
        assert result.candidate is not None
        assert f"{result.candidate.memory.total:.1f} of" in line


def test_adapters_are_not_suggested_where_rules_refuse_them():
    config, spec, _ = shipped(ONE_GPU)
    muon = overridden(config, ["optimizer.optimizer=muon"])
    reliefs = check_layout(muon, spec, gpus=1, gpu="l40s").reliefs
    assert reliefs
    assert not any("lora" in line for line in reliefs)
