"""A teacher's part of a prediction: what it adds, where, and nothing without it."""

from dataclasses import replace

import pytest

from megatron_moe.planner.calibration import FITTED
from megatron_moe.planner.flops import forward_flops, sequence_flops
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.memory import GIB, peak_memory, rank_memory
from megatron_moe.planner.parameters import rank_tensors
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, TeacherWork, Workload

MACHINE = Machine(gpu_named("h100"), FITTED)
WORK = Workload(sequence_length=4096, global_batch_size=64)


@pytest.fixture
def student(llama2: MoeShape) -> MoeShape:
    """A split: 8 experts of an eighth of the neurons, top-2."""
    return replace(
        llama2,
        moe_layers=frozenset(range(llama2.num_layers)),
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=llama2.ffn_hidden_size // 8,
    )


def taught(dense: MoeShape, **parts: bool) -> Workload:
    parts = {"logits": False, "layers": False, "router": False, **parts}
    return replace(WORK, teacher=TeacherWork(shape=dense, **parts))


@pytest.mark.parametrize("degrees", [
    Degrees(gpus=8), Degrees(gpus=8, tp=2, ep=4), Degrees(gpus=16, tp=2, pp=4, ep=2)], ids=str,
)  # fmt: skip
def test_memory_holds_the_weights_hidden_states_and_logits(
    student: MoeShape, llama2: MoeShape, degrees: Degrees
):
    work = taught(llama2, logits=True)
    for stage in range(degrees.pp):
        expected = 2 * sum(
            t.numel for chunk in rank_tensors(llama2, degrees, pp_rank=stage) for t in chunk
        )
        if stage == degrees.pp - 1:
            tokens, batches = work.sequence_length, work.micro_batches(degrees)
            expected += 2 * tokens * llama2.vocab_size // degrees.tp
            expected += 2 * batches * tokens // degrees.tp * llama2.hidden_size
        memory = rank_memory(student, work, degrees, pp_rank=stage)
        assert memory.teacher * GIB == pytest.approx(expected)
        without = rank_memory(student, WORK, degrees, pp_rank=stage)
        assert memory.total - memory.teacher == pytest.approx(without.total)


def test_nothing_is_said_of_a_teacher_without_one(student: MoeShape):
    degrees = Degrees(gpus=8, ep=8)
    assert "teacher" not in peak_memory(student, WORK, degrees).to_json()
    assert "teacher" not in step_time(student, WORK, degrees, MACHINE).parts


@pytest.mark.parametrize("part", ["logits", "layers", "router"])
def test_each_part_takes_time_and_counts_in_mfu(student: MoeShape, llama2: MoeShape, part: str):
    """Model FLOPs over time and peak give back the count."""
    degrees = Degrees(gpus=16, tp=2, pp=2, ep=4)
    time = step_time(student, taught(llama2, **{part: True}), degrees, MACHINE)
    alone = step_time(student, WORK, degrees, MACHINE)
    extra = time.step_seconds - alone.step_seconds
    assert extra == pytest.approx(time.parts["teacher"])
    assert 0 < extra < alone.step_seconds
    seconds = time.step_seconds * degrees.gpus * MACHINE.gpu.peak_flops / 100
    counted = time.mfu * seconds / WORK.global_batch_size
    added = counted - sequence_flops(student, WORK.sequence_length).causal
    if part == "logits":
        causal = forward_flops(llama2, sequence_length=WORK.sequence_length, causal=True)
        assert added == pytest.approx(causal.model, rel=1e-6)
    else:
        products = 4 if part == "router" else 3
        ffn = 2 * products * llama2.hidden_size * llama2.ffn_hidden_size
        assert added == pytest.approx(32 * WORK.sequence_length * ffn, rel=1e-6)
