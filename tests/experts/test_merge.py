"""Which experts are merged, in which order of neurons: by hand, and against a search over all."""

import itertools

import numpy as np
import pytest

from megatron_moe.experts.merge import groups, matched, merged


def experts(count: int, neurons: int = 5, width: int = 6, seed: int = 0) -> np.ndarray:
    """Return random gate, up and down of each expert, ``(O, 3, M, D)``."""
    drawn = np.random.default_rng(seed).standard_normal((count, 3, neurons, width))
    return drawn.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_neurons_are_matched_as_well_as_any_permutation_does(seed: int):
    target, source = experts(2, seed=seed)
    order_M = matched(target, source)

    def likeness(order: np.ndarray) -> float:
        return float((target * source[:, order]).sum())

    best = max(likeness(np.array(order)) for order in itertools.permutations(range(5)))
    assert sorted(order_M.tolist()) == [0, 1, 2, 3, 4]
    assert likeness(order_M) == pytest.approx(best, rel=1e-6)


def test_shuffled_neurons_are_found_again():
    (target,) = experts(1, neurons=40)
    order_M = np.random.default_rng(1).permutation(40)
    found_M = matched(target, target[:, order_M])
    assert np.array_equal(order_M[found_M], np.arange(40))


def test_rows_of_the_same_direction_are_grouped():
    router_OD = np.eye(4, dtype=np.float32)[[2, 0, 2, 1, 0, 1]]
    router_OD *= np.array([1, 2, 3, 1, 2, 3], dtype=np.float32)[:, None]
    assert groups(router_OD, 3).tolist() == [0, 1, 0, 2, 1, 2]
    assert groups(router_OD, 1).tolist() == [0] * 6
    assert groups(router_OD, 6).tolist() == list(range(6))


def test_twins_become_the_expert_they_come_from():
    """Their neurons are shuffled, and their loads differ."""
    one, other = experts(2)
    order_M = np.array([3, 1, 4, 0, 2])
    source = [one, other, one[:, order_M], other]
    router_OD = np.array([[1, 0], [0, 1], [1, 0.01], [0, 1]], dtype=np.float32)
    merge = merged(router_OD, np.array([30.0, 4, 10, 0]), 2, lambda o: list(source[o]))
    assert merge.into_O.tolist() == [0, 1, 0, 1]
    assert merge.weight_O.tolist() == [0.75, 1.0, 0.25, 0.0]
    assert merge.members(0) == [0, 2]
    assert merge.mixing().tolist() == [[0.75, 0, 0.25, 0], [0, 1, 0, 0]]
    for member, expected in zip(range(4), (one, other, one, other), strict=True):
        np.testing.assert_array_equal(source[member][:, merge.order_OM[member]], expected)


def test_experts_that_no_token_chooses_count_equally():
    merge = merged(np.ones((2, 3), dtype=np.float32), np.zeros(2), 1, lambda o: list(experts(2)[o]))
    assert merge.weight_O.tolist() == [0.5, 0.5]
