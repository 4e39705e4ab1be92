"""Test memory against Megatron-Core's buffer arithmetic and schedules, and its monotonicity."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.parts import Frozen
from megatron_moe.planner.activations import chunks_in_flight, kept_bytes, stage_activations
from megatron_moe.planner.buffers import distributed_layout
from megatron_moe.planner.by_matrix import muon_state
from megatron_moe.planner.hardware import GPUS
from megatron_moe.planner.memory import (
    StatePrecision,
    estimated_state,
    model_state,
    peak_memory,
    rank_memory,
)
from megatron_moe.planner.parameters import rank_parameters, rank_tensors
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import RECOMPUTE_SETTINGS, Degrees, Workload
from research.calibration.published import published

WORK = Workload(sequence_length=8192, global_batch_size=256, capacity_factor=1.0)


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    replicas=st.sampled_from([1, 2, 3, 8]),
    bucket_size=st.sampled_from([None, 4000]),
    alone=st.none() | st.integers(0, 29),
)
def test_buffers_are_laid_out_as_megatron_does(sizes, replicas, bucket_size, alone):
    torch = pytest.importorskip("torch")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    shared = frozenset({alone} if alone is not None and alone < len(sizes) else ())
    for index in shared:
        parameters[index].shared_embedding = True  # type: ignore[attr-defined]
    expected = DistributedOptimizer._compute_per_buffer_param_layout(
        parameters,
        bucket_size,
        replicas,
        DistributedDataParallelConfig(),
    )
    layout = distributed_layout(sizes, replicas=replicas, bucket_size=bucket_size, alone=shared)
    assert list(layout.buckets) == expected.bucket_indices
    assert list(layout.spans) == [span[:2] for span in expected.param_index_map.values()]
    owned = sum(layout.owned(replica, replicas=replicas) for replica in range(replicas))
    assert owned == sum(sizes)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 8), (8, 7)])
@pytest.mark.parametrize("micro_batches", [1, 8, 64])
def test_in_flight_is_one_more_than_megatrons_warm_up(pp, vpp, micro_batches):
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    if vpp > 1 and micro_batches % pp:
        pytest.skip("not a legal interleaved schedule")

    class Rank:
        virtual_pipeline_model_parallel_size = vpp if vpp > 1 else None

        def __init__(self, rank):
            self.pp_group = type("Group", (), {"size": lambda _: pp, "rank": lambda _: rank})()

    for rank in range(pp):
        _, everything, warm_up, _ = schedules.get_pp_rank_microbatches(
            micro_batches, vpp, pp, p2p_communicator=Rank(rank)
        )
        in_flight = chunks_in_flight(
            micro_batches=micro_batches, degrees=Degrees(gpus=pp, pp=pp, vpp=vpp), pp_rank=rank
        )
        assert in_flight == (warm_up if everything else warm_up + 1)


def test_state_is_18_bytes_a_parameter_without_sharding(llama3_e8t2):
    degrees = Degrees(gpus=8, ep=8)
    held = sum(rank_parameters(llama3_e8t2, degrees, pp_rank=0))
    state = model_state(llama3_e8t2, degrees, pp_rank=0, distributed_optimizer=False)
    assert (state.weights, state.gradients, state.optimizer) == (2 * held, 4 * held, 12 * held)
    full = model_state(llama3_e8t2, degrees, pp_rank=0, weight_bytes=4, distributed_optimizer=False)
    assert (full.weights, full.optimizer) == (4 * held, 8 * held)
    aware = model_state(
        llama3_e8t2, degrees, pp_rank=0, distributed_optimizer=False,
        precision=StatePrecision(gradient=2, moments=4),
    )  # fmt: skip
    assert (aware.gradients, aware.optimizer) == (2 * held, 8 * held)


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (2, 2, 4), (4, 1, 8), (1, 4, 2)])
def test_replicas_share_the_optimizer_between_them(llama3_e8t2, tp, pp, ep):
    degrees = Degrees(gpus=64, tp=tp, pp=pp, ep=ep)
    for pp_rank in range(pp):
        tensors = [t for c in rank_tensors(llama3_e8t2, degrees, pp_rank=pp_rank) for t in c]
        for kind, replicas in ((False, degrees.dp), (True, degrees.edp)):
            sizes = [t.numel for t in tensors if t.expert is kind]
            layout = distributed_layout(sizes, replicas=replicas)
            owned = [layout.owned(r, replicas=replicas) for r in range(replicas)]
            assert sum(owned) == sum(sizes)


def test_closed_form_state_is_within_padding_of_the_exact(llama3_e8t2):
    for degrees in (Degrees(gpus=128, cp=2, pp=4, vpp=8, ep=8), Degrees(gpus=16, tp=2, ep=4)):
        exact = model_state(llama3_e8t2, degrees, pp_rank=0)
        quick = estimated_state(llama3_e8t2, WORK, degrees, pp_rank=0)
        assert quick.weights == pytest.approx(exact.weights, rel=1e-5)
        assert quick.optimizer == pytest.approx(exact.optimizer, rel=1e-4)


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("experts",),
        ("attention", "norms", "embeddings"),
        ("experts@0-9", "attention@12-31", "norms@3"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_closed_form_state_follows_roles_and_the_optimizer(llama3_e8t2, frozen, optimizer):
    """Whole matrices cannot be spread evenly: within a tenth of the mean over the replicas."""
    degrees, frozen = Degrees(gpus=16, tp=2, pp=2, ep=4), Frozen.named(frozen)
    for pp_rank in range(2):
        if optimizer == "muon":
            exact = [
                muon_state(llama3_e8t2, degrees, pp_rank=pp_rank, frozen=frozen, replica=r,
                           expert_replica=0)
                for r in range(degrees.dp)
            ]  # fmt: skip
        else:
            exact = [model_state(llama3_e8t2, degrees, pp_rank=pp_rank, frozen=frozen)]
        work = replace(WORK, frozen=frozen, optimizer=optimizer)
        quick = estimated_state(llama3_e8t2, work, degrees, pp_rank=pp_rank)
        assert quick.weights == pytest.approx(exact[0].weights, rel=1e-5)
        assert quick.gradients == pytest.approx(exact[0].gradients, rel=1e-4)
        mean = sum(state.optimizer for state in exact) / len(exact)
        tolerance = 0.1 if optimizer == "muon" else 1e-3
        assert quick.optimizer == pytest.approx(mean, rel=tolerance)


def test_recomputing_more_keeps_less(llama3_e8t2):
    degrees = Degrees(gpus=128, cp=2, pp=4, vpp=8, ep=8)
    kept = [
        kept_bytes(llama3_e8t2, replace(WORK, recompute=setting), degrees, routes=True)
        for setting in RECOMPUTE_SETTINGS
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(RECOMPUTE_SETTINGS)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_sharing_a_sequence_shares_its_activations(axis, llama3_e8t2):
    one = kept_bytes(llama3_e8t2, WORK, Degrees(gpus=8, ep=8), routes=True)
    two = kept_bytes(llama3_e8t2, WORK, Degrees(gpus=8, ep=8, **{axis: 2}), routes=True)
    assert two == pytest.approx(one / 2)


def test_the_first_stage_keeps_most_and_interleaving_keeps_more(llama3_e8t2):
    plain, chunked = (Degrees(gpus=128, pp=4, vpp=vpp, ep=8) for vpp in (1, 4))
    kept = [stage_activations(llama3_e8t2, WORK, plain, pp_rank=rank) for rank in range(4)]
    assert kept == sorted(kept, reverse=True)
    assert stage_activations(llama3_e8t2, WORK, chunked, pp_rank=0) > kept[0]


def test_paired_passes_keep_one_layer_more(llama3_e8t2: MoeShape):
    """They take turns layer by layer: one pass frees a layer after the other has added one."""
    degrees = Degrees(gpus=8, ep=8)
    one, paired = (
        stage_activations(llama3_e8t2, replace(WORK, expert_overlap=on), degrees, pp_rank=0)
        for on in (False, True)
    )
    layer = kept_bytes(llama3_e8t2, WORK, degrees, routes=True)
    assert paired - one == pytest.approx(layer)


@given(
    factor=st.floats(0.5, 4.0),
    imbalance=st.floats(1.0, 4.0),
    size=st.sampled_from([1, 2, 4]),
)
def test_more_tokens_need_more_memory(factor, imbalance, size):
    shape = published()[0].shape
    degrees = Degrees(gpus=64, pp=2, ep=8)
    dropless = replace(WORK, capacity_factor=None, imbalance=imbalance, micro_batch_size=size)
    capped = replace(dropless, capacity_factor=factor)
    padded = replace(capped, pad_to_capacity=True)
    first, second, third = (
        peak_memory(shape, work, degrees).total for work in (capped, dropless, padded)
    )
    assert first <= second
    assert third >= first
    doubled = replace(dropless, micro_batch_size=2 * size)
    assert kept_bytes(shape, doubled, degrees, routes=True) == pytest.approx(
        2 * kept_bytes(shape, dropless, degrees, routes=True)
    )


def test_logits_live_on_the_last_stage(llama3_e8t2):
    degrees = Degrees(gpus=128, tp=2, pp=4, ep=8)
    first, last = (rank_memory(llama3_e8t2, WORK, degrees, pp_rank=rank) for rank in (0, 3))
    assert first.logits == 0
    # 2 bytes for each of 8192 tokens and half the vocabulary; the gradient reuses this memory.
    assert last.logits * 2**30 == 2 * 8192 * 128256 / 2


def test_every_published_run_fits_without_recomputation():
    for row in published():
        assert peak_memory(row.shape, row.work, row.degrees).total < GPUS["h100"].usable_gib
