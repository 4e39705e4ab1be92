"""A blend keeps its shares, and resumes exactly at any position."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.batches import micro_batches
from megatron_moe.data.blend import (
    BlendState,
    draw,
    epochs_of_domains,
    next_global_batch,
    repetition_warnings,
    start_blend,
)
from megatron_moe.data.samples import Sample
from megatron_moe.errors import CheckpointError, ConfigError

WEIGHTS = st.lists(st.floats(1e-3, 1), min_size=1, max_size=8).map(
    lambda ws: {f"domain{i}": w / math.fsum(ws) for i, w in enumerate(ws)}
)


class Numbered:
    """Source whose sample k of domain d is (d, k, k)."""

    def __init__(self, domain: int) -> None:
        self.domain = domain

    def __getitem__(self, k: int) -> Sample:
        return Sample(
            ids_T=np.array([self.domain, k, k]),
            loss_mask_S=np.ones(2, dtype=np.float32),
            position_ids_S=np.arange(2),
        )


SHARES = {"web": 0.5, "code": 0.3, "wiki": 0.2}
SOURCES = {name: Numbered(i) for i, name in enumerate(SHARES)}


def test_proportions_over_many_samples_are_the_weights():
    weights = {"a": 0.67, "b": 0.15, "c": 0.045, "d": 0.045, "e": 0.045, "f": 0.025, "g": 0.02}
    drawn, state = draw(start_blend(weights), 100_000)
    shares = np.bincount(drawn) / 100_000
    assert shares == pytest.approx(list(weights.values()), abs=2e-5)
    assert state.consumed == tuple(np.bincount(drawn))
    assert state.position == 100_000


@given(WEIGHTS, st.integers(0, 300))
def test_no_domain_ever_strays_from_its_share(weights: dict[str, float], count: int):
    _, state = draw(start_blend(weights), count)
    for consumed, weight in zip(state.consumed, state.weights, strict=True):
        assert -(len(weights) - 1) - 1e-9 < consumed - count * weight < 1 + 1e-9


@given(WEIGHTS, st.lists(st.integers(0, 40), max_size=8))
def test_draws_do_not_depend_on_how_they_are_grouped(weights: dict[str, float], groups: list[int]):
    state, drawn = start_blend(weights), []
    for count in groups:
        part, state = draw(state, count)
        drawn += part
    assert (drawn, state) == draw(start_blend(weights), sum(groups))


@given(WEIGHTS, st.integers(0, 200), st.integers(1, 100))
def test_a_state_read_back_from_json_continues_the_same(
    weights: dict[str, float], before: int, after: int
):
    _, state = draw(start_blend(weights), before)
    back = BlendState.from_json(json.loads(json.dumps(state.to_json())), domains=tuple(weights))
    assert back == state
    assert draw(back, after) == draw(state, after)


def test_new_weights_count_from_where_they_are_set():
    _, state = draw(start_blend({"a": 0.5, "b": 0.5}), 100)
    drawn, state = draw(state.reweighted([0.9, 0.1]), 1000)
    assert drawn.count(0) == pytest.approx(900, abs=1)
    assert state.consumed == (50 + drawn.count(0), 50 + drawn.count(1))


def run(*, steps: int, dp_size: int, stop_at: int = 0, micro_batch_size: int = 2) -> list[list]:
    """Return the sorted samples of each step; at ``stop_at`` the run resumes from its JSON."""
    state, seen = start_blend(SHARES), []
    for step in range(steps):
        if step == stop_at:
            saved = json.dumps(state.to_json())
            state = BlendState.from_json(json.loads(saved), domains=tuple(SHARES))
        position = state.position
        batch, state = next_global_batch(SOURCES, state, global_batch_size=16, seed=1)
        seen.append(
            sorted(
                row
                for rank in range(dp_size)
                for micro in micro_batches(
                    batch,
                    position=position,
                    global_batch_size=16,
                    micro_batch_size=micro_batch_size,
                    dp_rank=rank,
                    dp_size=dp_size,
                )
                for row in micro.tokens_BS.tolist()
            )
        )
    return seen


@pytest.mark.parametrize("dp_size", [2, 8])
@pytest.mark.parametrize("stop_at", range(5))
def test_steps_are_the_same_for_any_world_and_after_a_resume(dp_size: int, stop_at: int):
    expected = run(steps=5, dp_size=1)
    assert run(steps=5, dp_size=dp_size, stop_at=stop_at) == expected
    # Each domain is read from its beginning, without gaps or repetitions.
    rows = [row for step in expected for row in step]
    for domain in range(3):
        read = sorted(k for d, k in rows if d == domain)
        assert read == list(range(len(read)))


def test_domains_do_not_stick_to_ranks():
    # Two equal domains are drawn in turn and assigned to two ranks in turn: without a shuffle
    # rank 0 would see only one domain.
    state, sources = start_blend({"a": 0.5, "b": 0.5}), {"a": Numbered(0), "b": Numbered(1)}
    of_rank_0 = []
    for _ in range(50):
        position = state.position
        batch, state = next_global_batch(sources, state, global_batch_size=4, seed=0)
        of_rank_0 += [batch[position + k].ids_T[0] for k in (0, 2)]
    assert 0.35 < np.mean(of_rank_0) < 0.65


def test_a_checkpoint_of_other_domains_is_refused():
    saved = start_blend({"a": 0.5, "b": 0.5}).to_json()
    with pytest.raises(CheckpointError, match=r"mixes the domains a, b, but the .* mixes b, a"):
        BlendState.from_json(saved, domains=("b", "a"))


def test_weights_are_checked_at_the_start():
    with pytest.raises(ConfigError, match="sum to 2"):
        start_blend({"a": 1.0, "b": 1.0})


def test_a_domain_that_is_too_small_is_reported_before_the_run():
    epochs = epochs_of_domains(
        {"web": 0.7, "papers": 0.3}, {"web": 700, "papers": 30}, num_samples=1100
    )
    assert epochs == pytest.approx({"web": 1.1, "papers": 11.0})
    (line,) = repetition_warnings(epochs, limit=4)
    assert line.startswith("domain papers will be read 11.0 times, more than 4:")
