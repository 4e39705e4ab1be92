"""Packing keeps every document whole and exactly once, and its bounds can be recovered."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.packing import document_bounds, pack


@given(
    st.integers(1, 64).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=200)
        )
    )
)
def test_packs_hold_every_document_once_and_none_could_be_joined(drawn: tuple[int, list[int]]):
    capacity, lengths = drawn
    packs = pack(lengths, capacity=capacity)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in members) for members in packs)
    assert all(0 < used <= capacity for used in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_the_longest_go_first_and_where_they_leave_least_room():
    assert pack([3, 5, 7], capacity=10) == [[2, 0], [1]]
    assert pack([2, 3, 5, 7, 3], capacity=10) == [[3, 1], [2, 4, 0]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_bounds_are_found_in_the_positions(lengths: list[int]):
    positions_S = torch.cat([torch.arange(length) for length in lengths])
    bounds = document_bounds(positions_S)
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist() == lengths
    assert bounds[0] == 0


def test_a_real_spread_of_lengths_wastes_little():
    lengths = (torch.rand(20_000, generator=torch.Generator().manual_seed(0)) ** 3 * 2048).int() + 1
    packs = pack(lengths.tolist(), capacity=2049)
    assert lengths.sum() / (len(packs) * 2049) > 0.99
