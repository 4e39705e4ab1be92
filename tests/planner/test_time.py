"""Test the time model: its bounds, and the direction of each term."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.planner.activations import paired_share
from megatron_moe.planner.calibration import FITTED
from megatron_moe.planner.hardware import GPUS
from megatron_moe.planner.kernels import Kernels
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.network import Group
from megatron_moe.planner.time import least_seconds, step_time
from megatron_moe.planner.workload import RECOMPUTE_SETTINGS, Degrees
from research.calibration.fit import predict
from research.calibration.published import published

H100 = Machine(GPUS["h100"], FITTED)


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row.model}-{row.mfu}")
def test_parts_sum_to_the_step_and_mfu_is_its_definition(row):
    time = predict(row)
    assert sum(time.parts.values()) == pytest.approx(time.step_seconds)
    assert all(seconds >= 0 for seconds in time.parts.values())
    tokens = row.work.sequence_length * row.work.global_batch_size
    assert time.tokens_per_second_per_gpu == pytest.approx(
        tokens / time.step_seconds / row.degrees.gpus
    )
    assert 0 < time.mfu < time.mfu_full_attention < 100 * FITTED.gemm_efficiency


def test_both_mfu_are_their_published_flops():
    """Compare with the FLOPs that arXiv 2412.09952, table 1, prints for a sequence of 8192."""
    row = published()[0]
    time = predict(row)
    peak = time.step_seconds * row.degrees.gpus * 989.5e12
    assert time.mfu_full_attention == pytest.approx(100 * 256 * 7.515e14 / peak, rel=1e-3)
    scores = 3 * 32 * 4 * 8192**2 * 4096  # of all layers, forward and backward
    causal = 7.515e14 - scores * (1 - 8193 / 16384)
    assert time.mfu == pytest.approx(100 * 256 * causal / peak, rel=1e-3)


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row.model}-{row.mfu}")
def test_no_layout_beats_its_familys_bound(row):
    bound = least_seconds(row.shape, row.work, row.degrees, H100)
    assert bound < predict(row).step_seconds


def test_interleaving_and_larger_batches_shrink_the_bubble():
    row = published()[0]
    finer = [
        step_time(row.shape, row.work, replace(row.degrees, vpp=vpp), H100).parts["bubble"]
        for vpp in (1, 2, 4, 8)
    ]
    assert finer == sorted(finer, reverse=True)
    larger = [
        step_time(row.shape, replace(row.work, global_batch_size=gbs), row.degrees, H100).mfu
        for gbs in (64, 128, 256, 1024)
    ]
    assert larger == sorted(larger)


def test_recomputing_more_takes_longer():
    row = published()[0]
    seconds = [
        step_time(row.shape, replace(row.work, recompute=s), row.degrees, H100).step_seconds
        for s in RECOMPUTE_SETTINGS
    ]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(RECOMPUTE_SETTINGS)


def test_a_device_check_costs_its_share_of_the_forward_and_backward_passes():
    row = published()[0]
    plain = predict(row)
    checked = step_time(row.shape, replace(row.work, device_check_interval=10), row.degrees, H100)
    again = plain.step_seconds - plain.parts["dp"] - plain.parts["optimizer"]
    assert checked.parts["device_check"] == pytest.approx(again / 10)
    assert checked.step_seconds == pytest.approx(plain.step_seconds + again / 10)


def test_experts_across_nodes_are_slower_than_within():
    row = published()[5]
    inside = predict(row)
    outside = step_time(
        row.shape, row.work, replace(row.degrees, ep=8, etp=2), H100
    )  # 16 ranks: two nodes
    assert outside.parts["ep"] > 3 * inside.parts["ep"]


def test_strong_scaling_loses_efficiency():
    row = next(r for r in published() if r.work.global_batch_size == 1024)
    mfu = [
        step_time(row.shape, row.work, replace(row.degrees, gpus=gpus), H100).mfu
        for gpus in (128, 256, 512, 1024)
    ]
    assert mfu == sorted(mfu, reverse=True)


@given(name=st.sampled_from(sorted(GPUS)), factor=st.floats(0.5, 2.0), imbalance=st.floats(1, 3))
def test_more_load_takes_longer_on_every_gpu(name, factor, imbalance):
    row, machine = published()[0], Machine(GPUS[name], FITTED)
    light = replace(row.work, capacity_factor=factor, imbalance=imbalance)
    heavy = replace(light, capacity_factor=None)
    times = [step_time(row.shape, w, row.degrees, machine).step_seconds for w in (light, heavy)]
    assert times[0] <= times[1]


def test_a_faster_gpu_is_faster():
    row = published()[0]
    tokens = [
        step_time(row.shape, row.work, row.degrees, Machine(GPUS[n], FITTED))
        .tokens_per_second_per_gpu
        for n in ("a100", "h100", "h200", "b200")
    ]  # fmt: skip
    assert tokens == sorted(tokens)


def test_groups_in_one_node_cost_less_than_the_same_across():
    links = H100.links
    near, far = Group(8, 1), Group(8, 8)
    for seconds in (links.all_to_all, links.gather, links.send):
        assert seconds(far, 1e9) > 5 * seconds(near, 1e9)
        assert seconds(Group(1, 1), 1e9) == 0


def test_degrees_derive_dp_and_edp():
    degrees = Degrees(gpus=128, tp=2, cp=2, pp=4, ep=8, etp=2)
    assert (degrees.dp, degrees.edp) == (8, 2)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (4, 1), (4, 8)])
def test_the_bubble_is_pp_minus_one_chunks_of_a_micro_batch(pp, vpp):
    """Compare with Narayanan et al. (arXiv 2104.04473, section 2.2): (pp - 1) / (vpp * m)."""
    row = published()[0]
    degrees = replace(row.degrees, pp=pp, vpp=vpp)
    parts = dict(step_time(row.shape, row.work, degrees, H100).parts)
    bubble = parts.pop("bubble")
    ideal = sum(seconds for name, seconds in parts.items() if name not in ("pp", "dp", "optimizer"))
    batches = row.work.micro_batches(degrees)
    assert bubble == pytest.approx((pp - 1) / (vpp * batches) * ideal)


def test_the_torch_engine_is_slower_by_its_terms():
    """Its attention, rotary embedding, SwiGLU and expert gradients take longer; the rest equals."""
    row = published()[0]
    fused, torch = (
        step_time(row.shape, replace(row.work, engine=engine), row.degrees, H100).parts
        for engine in ("transformer_engine", "torch")
    )
    slower = {name for name in fused if torch[name] > fused[name]}
    assert slower == {"attention", "gemm", "memory", "bubble"}
    assert torch["attention"] / fused["attention"] == pytest.approx(0.62 / 0.35)
    # A grouped product writes its gradients in bf16, and reads them again to add them.
    a100 = Machine(GPUS["a100"], FITTED)
    parts = [
        step_time(row.shape, replace(row.work, engine=engine), row.degrees, a100).parts
        for engine in ("transformer_engine", "torch")
    ]
    assert parts[0]["attention"] == parts[1]["attention"]


def test_overlapped_tensor_parallelism_leaves_a_part_exposed():
    row = next(r for r in published() if r.degrees.tp == 4)
    alone = step_time(row.shape, row.work, row.degrees, H100).parts["tp"]
    work = replace(row.work, tp_comm_overlap=True)
    overlapped = step_time(row.shape, work, row.degrees, H100).parts["tp"]
    # Of five collectives three are exposed without it and none with it; 30% of a hidden one remain.
    assert overlapped / alone == pytest.approx(5 * 0.3 / (3 + 2 * 0.3))


def test_ranks_that_share_a_query_group_gather_the_fused_projection():
    """With 2 query groups, tp 4 gathers it once in each pass; with 4 it does not."""
    row = next(r for r in published() if r.degrees.tp == 4)
    few, enough = (
        step_time(replace(row.shape, num_query_groups=groups), row.work, row.degrees, H100).parts
        for groups in (2, 4)
    )
    shape = replace(row.shape, num_query_groups=2)
    fused = 4096 * (shape.query_width + 2 * shape.kv_width) * 2
    once = H100.links.gather(Group(4, 1), fused)
    layers = shape.num_layers * row.work.micro_batches(row.degrees) / row.degrees.pp
    assert few["tp"] - enough["tp"] == pytest.approx(2 * once * layers)


def test_accumulation_of_gradients_hides_behind_large_products_only():
    """The backward pass of a product of many rows is twice its forward pass, of few rows longer."""
    kernels = Kernels(GPUS["h100"], FITTED)
    many, few = (kernels.linear(rows, 8192, 57344) for rows in (65536, 512))
    assert many.backward / many.forward == pytest.approx(2, abs=0.02)
    assert few.backward / few.forward > 2.3


def test_an_overlapped_exchange_hides_in_pairs_of_passes_only():
    """One micro-batch has no pair; under pp, interleaved chunks have them, after the warm-up."""
    alone = Degrees(gpus=8, ep=8)
    row = published()[0]
    work = replace(row.work, micro_batch_size=1)
    for degrees, batches, share in (
        (alone, 1, 0.0), (alone, 4, 3 / 4), (replace(alone, gpus=16, pp=2), 4, 0.0),
        (replace(alone, gpus=16, pp=2, vpp=2), 8, (16 - 5) / 16),
        (replace(alone, gpus=16, pp=2, vpp=2), 2, 0.0),
    ):  # fmt: skip
        step = replace(work, global_batch_size=batches * degrees.dp)
        before = step_time(row.shape, step, degrees, H100)
        after = step_time(row.shape, replace(step, expert_overlap=True), degrees, H100)
        assert after.parts["ep"] == pytest.approx(before.parts["ep"] * (1 - 0.7 * share))
        others = before.parts.keys() - {"ep"}
        assert all(after.parts[name] == before.parts[name] for name in others)
        bound = least_seconds(row.shape, replace(step, expert_overlap=True), degrees, H100)
        assert bound < after.step_seconds


@pytest.mark.parametrize("pp", [2, 4])
def test_the_pairs_are_those_of_megatrons_schedule(pp: int):
    """Megatron-Core's own count of the passes that remain after the warm-up, on the first rank."""
    from types import SimpleNamespace

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for vpp, batches in ((2, 8), (4, 8), (2, 4)):
        group = SimpleNamespace(size=lambda: pp, rank=lambda: 0)
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp)
        total, _, _, remaining = get_pp_rank_microbatches(
            batches, vpp, pp, overlap_moe_expert_parallel_comm=True, p2p_communicator=communicator
        )
        degrees = Degrees(gpus=pp, pp=pp, vpp=vpp)
        assert paired_share(micro_batches=batches, degrees=degrees) == remaining / total
