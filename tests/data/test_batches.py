"""Samples are the same for any layout, and every chunk is read exactly once per epoch."""

import megatron.core.utils
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_moe.data.batches import (
    Batch,
    micro_batches,
    slice_for_context_parallel,
    validation_batches,
)
from megatron_moe.data.order import permuted
from megatron_moe.data.samples import Samples
from megatron_moe.data.stream import TokenStream
from megatron_moe.errors import ConfigError, DataError

S = 8
NUM_CHUNKS = 25


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """Tokens 0, 1, 2, ... in documents of 17, so that a token is its own position."""
    prefix = tmp_path_factory.mktemp("stream") / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    num_tokens = NUM_CHUNKS * S + 5
    for tokens in torch.arange(num_tokens).split(17):
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return TokenStream(prefix, vocab_size=num_tokens)


@pytest.fixture(scope="module")
def samples(stream: TokenStream) -> Samples:
    return Samples(stream, seq_length=S, seed=3)


@given(size=st.integers(1, 2000), seed=st.integers(0, 2**63), epoch=st.integers(0, 100))
def test_every_place_of_a_permutation_is_taken_once(size: int, seed: int, epoch: int):
    assert sorted(permuted(i, size, seed=seed, epoch=epoch) for i in range(size)) == list(
        range(size)
    )


def test_permutations_look_random():
    # Over many seeds each element must occur at each position equally often: chi-square with
    # 6 * 6 degrees of freedom stays below its 99.9% quantile, 67.98.
    size, draws = 7, 3000
    counts = np.zeros((size, size))
    for seed in range(draws):
        for i in range(size):
            counts[i, permuted(i, size, seed=seed, epoch=0)] += 1
    expected = draws / size
    assert ((counts - expected) ** 2 / expected).sum() < 67.98


def test_neighbours_are_torn_apart_and_epochs_differ():
    n = 100_003
    first = np.array([permuted(i, n, seed=0, epoch=0) for i in range(2000)])
    second = np.array([permuted(i, n, seed=0, epoch=1) for i in range(2000)])
    for order in (first, second):
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
        assert abs(order.mean() / n - 0.5) < 0.05
    assert (first == second).mean() < 0.01


def test_the_order_of_a_seed_never_changes():
    # A run must resume at the same position under newer versions of all libraries.
    orders = {
        (0, 0): [1, 9, 8, 5, 6, 0, 7, 3, 2, 4],
        (0, 1): [6, 1, 7, 5, 3, 9, 4, 8, 0, 2],
        (1, 0): [8, 6, 0, 5, 3, 4, 1, 9, 2, 7],
    }
    for (seed, epoch), order in orders.items():
        assert [permuted(i, 10, seed=seed, epoch=epoch) for i in range(10)] == order


def test_an_epoch_has_every_token_as_an_input_once(samples: Samples):
    assert samples.num_chunks == NUM_CHUNKS
    for epoch in range(3):
        rows = [samples[epoch * NUM_CHUNKS + k].ids_T for k in range(NUM_CHUNKS)]
        assert sorted(np.concatenate([row[:-1] for row in rows])) == list(range(NUM_CHUNKS * S))
        for row in rows:
            assert row.tolist() == list(range(row[0], row[0] + S + 1))
    assert [samples[k].ids_T[0] for k in range(NUM_CHUNKS)] != [
        samples[NUM_CHUNKS + k].ids_T[0] for k in range(NUM_CHUNKS)
    ]


def test_a_text_shorter_than_a_sample_is_refused(stream: TokenStream):
    assert Samples(stream, seq_length=stream.num_tokens - 1, seed=0).num_chunks == 1
    with pytest.raises(DataError, match=r"has 205 tokens, fewer than .* = 206"):
        Samples(stream, seq_length=stream.num_tokens, seed=0)


def test_a_batch_is_what_the_model_needs(samples: Samples):
    (batch,) = micro_batches(
        samples, position=0, global_batch_size=2, micro_batch_size=2, dp_rank=0, dp_size=1
    )
    assert batch.tokens_BS.shape == (2, S)
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert torch.equal(batch.labels_BS, batch.tokens_BS + 1)
    assert torch.equal(batch.loss_mask_BS, torch.ones(2, S))
    assert batch.position_ids_BS.tolist() == [list(range(S))] * 2


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_has_the_same_samples_for_any_world(
    samples: Samples, dp_size: int, micro_batch_size: int
):
    position, global_batch_size = 48, 16
    rows = [
        row
        for dp_rank in range(dp_size)
        for batch in micro_batches(
            samples,
            position=position,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        for row in batch.tokens_BS.tolist()
    ]
    expected = [samples[position + k].ids_T[:-1].tolist() for k in range(global_batch_size)]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 3), (2, 2), (4, 1), (8, 2)])
def test_validation_counts_each_sample_once_for_any_world(
    samples: Samples, dp_size: int, micro_batch_size: int
):
    batches = [
        validation_batches(
            samples,
            num_samples=7,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1, "collectives need equal counts"
    counted = torch.cat(
        [batch.tokens_BS[batch.loss_mask_BS > 0] for of_rank in batches for batch in of_rank]
    )
    assert counted.sort().values.tolist() == list(range(7 * S))


def test_validation_takes_all_of_a_short_text(samples: Samples):
    batches = validation_batches(
        samples, num_samples=1000, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    assert len(batches) == NUM_CHUNKS


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_context_parallel_runs_are_megatrons(
    samples: Samples, cp_size: int, monkeypatch: pytest.MonkeyPatch
):
    (batch,) = micro_batches(
        samples, position=5, global_batch_size=3, micro_batch_size=3, dp_rank=0, dp_size=1
    )
    seen = []
    for cp_rank in range(cp_size):
        sliced = slice_for_context_parallel(batch, cp_rank=cp_rank, cp_size=cp_size)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: cp_size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=cp_rank: rank)
        expected = megatron.core.utils.get_batch_on_this_cp_rank(
            {"tokens": batch.tokens_BS, "position_ids": batch.position_ids_BS, "cu_seqlens": None},
            is_hybrid_cp=False,
        )
        assert torch.equal(sliced.tokens_BS, expected["tokens"])
        assert torch.equal(sliced.position_ids_BS, expected["position_ids"])
        assert torch.equal(sliced.labels_BS, sliced.tokens_BS + 1)
        seen += sliced.tokens_BS[0].tolist()
    assert sorted(seen) == batch.tokens_BS[0].tolist()


def test_a_sequence_that_context_parallelism_cannot_cut_is_refused(samples: Samples):
    (batch,) = micro_batches(
        samples, position=0, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    with pytest.raises(ConfigError, match=r"data.seq_length \(8\) must be divisible by .* = 6"):
        slice_for_context_parallel(batch, cp_rank=0, cp_size=3)


def test_batches_for_a_gpu_are_pinned_after_they_are_sliced(monkeypatch: pytest.MonkeyPatch):
    """Non-blocking copies need pinned memory; slicing allocates new memory, so pin after it."""
    from types import SimpleNamespace
    from typing import Any

    from megatron_moe.config.train import Train
    from megatron_moe.data import feed as feed_module
    from megatron_moe.data.feed import DataRank, Feed

    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape[1])
        return tensor

    ids_BS = torch.zeros(1, 8, dtype=torch.int64)
    batch = Batch(ids_BS, ids_BS, ids_BS.float(), ids_BS, torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(feed_module, "next_global_batch", lambda *args, **kwargs: ([], "after"))
    monkeypatch.setattr(feed_module, "micro_batches", lambda *args, **kwargs: [batch])
    train = Train(steps=1)  # batches of one sequence
    config: Any = SimpleNamespace(train=train, run=SimpleNamespace(seed=0))
    texts: Any = SimpleNamespace(training={})
    blend: Any = SimpleNamespace(position=0)
    data_rank = DataRank(dp_rank=0, dp_size=1, cp_rank=0, cp_size=2)
    Feed(texts, config, data_rank).next_step(blend)
    assert pinned == []
    Feed(texts, config, data_rank, pin=True).next_step(blend)
    assert pinned == [4] * 4
