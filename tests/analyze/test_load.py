"""Test balance and distances against cases that can be computed by hand."""

import math

import numpy as np
import pytest

from megatron_moe.analyze.load import (
    between_others,
    dead,
    distance_of_halves,
    distances,
    entropy,
    max_over_mean,
    shares,
)

EVEN, ONE, NONE = [5, 5, 5, 5], [0, 8, 0, 0], [0, 0, 0, 0]


def test_balance_and_its_opposite():
    counts_XE = np.array([EVEN, ONE, NONE])
    assert entropy(counts_XE) == pytest.approx([math.log(4), 0, 0])
    assert max_over_mean(counts_XE) == pytest.approx([1, 4, 0])
    assert dead(counts_XE).tolist() == [0, 3, 4]
    assert shares(counts_XE).sum(axis=-1).tolist() == [1, 1, 0]


def test_distances_compare_shares_regardless_of_text_length():
    counts_ZLE = np.array([[EVEN, ONE], [[50, 50, 50, 50], [0, 0, 3, 0]]])
    apart_LZZ = distances(counts_ZLE)
    assert apart_LZZ[0] == pytest.approx(np.zeros((2, 2)))
    assert apart_LZZ[1] == pytest.approx(np.array([[0, math.sqrt(2)], [math.sqrt(2), 0]]))
    assert between_others(apart_LZZ) == pytest.approx([0, math.sqrt(2)])


def test_distances_by_the_definition():
    counts_ZLE = np.random.default_rng(0).integers(0, 50, (5, 3, 8))
    apart_LZZ = distances(counts_ZLE)
    for layer in range(3):
        for a in range(5):
            for b in range(5):
                one, other = counts_ZLE[a, layer], counts_ZLE[b, layer]
                expected = math.dist(one / one.sum(), other / other.sum())
                assert apart_LZZ[layer, a, b] == pytest.approx(expected, abs=1e-12)


def test_distance_of_halves():
    counts_Z2LE = np.array([[[EVEN], [EVEN]], [[ONE], [[2, 6, 0, 0]]]])
    assert distance_of_halves(counts_Z2LE) == pytest.approx(
        np.array([[0], [math.dist([0, 1], [0.25, 0.75])]])
    )
