"""Which experts of a MoE are copied and kept: by hand, and against a search over all choices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.recipe import Recipe
from megatron_moe.experts.reuse import by_score, copy_index, grow, keep, prune
from megatron_moe.experts.router import twin_rows

RECIPE = Recipe(
    method="grow", seed=3, num_experts=8, expert_ffn_hidden_size=5, dense_ffn_hidden_size=5,
    hidden_size=6, router_init_std=0.1, moe_layers=(0, 1), source_experts=4, shared_size=3,
)  # fmt: skip


def test_even():
    assert keep(replace(RECIPE, num_experts=4), 0, Evidence()).expert_E.tolist() == [0, 1, 2, 3]
    part = grow(RECIPE, 0, Evidence())
    assert part.expert_E.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part.neurons_EM.tolist() == [[0, 1, 2, 3, 4]] * 8
    assert part.shared_S.tolist() == [0, 1, 2]
    assert prune(replace(RECIPE, num_experts=2), 0, Evidence()).expert_E.tolist() == [0, 2]


def test_prune_keeps_the_highest_scores_in_order():
    recipe = replace(RECIPE, num_experts=2, choose="reap")
    part = prune(recipe, 0, Evidence(score_O=np.array([0.5, 0.1, 0.9, 0.5])))
    assert part.expert_E.tolist() == [0, 2]  # the first of equal scores


@pytest.mark.parametrize("seed", range(5))
def test_copies_balance_the_score_per_copy(seed: int):
    """No other numbers of copies make the largest score per copy smaller."""
    score_O = np.random.default_rng(seed).random(4)
    copies_O = np.bincount(by_score(score_O, 9), minlength=4)
    others = [c for c in itertools.product(range(1, 7), repeat=4) if sum(c) == 9]
    best = min(float((score_O / np.array(copies)).max()) for copies in others)
    assert (score_O / copies_O).max() == pytest.approx(best)
    assert copies_O.min() >= 1
    part = grow(replace(RECIPE, num_experts=9, choose="load"), 0, Evidence(score_O=score_O))
    assert np.array_equal(part.expert_E, by_score(score_O, 9))


EXPERTS = np.array([0, 0, 0, 1, 2, 2])


def test_copies_are_counted():
    assert copy_index(EXPERTS).tolist() == [0, 1, 2, 0, 0, 1]


def test_noise_changes_all_copies_but_the_first():
    rows_ED = twin_rows(replace(RECIPE, num_experts=6, twins="noise"), 1, EXPERTS)
    assert rows_ED is not None
    changed_E = np.abs(rows_ED).max(axis=1) > 0
    assert changed_E.tolist() == [False, True, True, False, False, True]
    assert len(np.unique(rows_ED[changed_E], axis=0)) == 3


def test_bias_is_the_same_for_copies_of_the_same_number():
    recipe = replace(RECIPE, num_experts=6, twins="bias")
    rows_ED = twin_rows(recipe, 1, EXPERTS)
    assert rows_ED is not None
    for one, other in itertools.combinations(range(6), 2):
        same = copy_index(EXPERTS)[one] == copy_index(EXPERTS)[other]
        assert np.array_equal(rows_ED[one], rows_ED[other]) == same
    assert not np.array_equal(rows_ED, twin_rows(recipe, 0, EXPERTS))


def test_exact_changes_nothing():
    assert twin_rows(replace(RECIPE, twins="exact"), 0, EXPERTS) is None
