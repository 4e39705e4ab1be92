"""Properties of every method: sizes, ranges, coverage, and that results depend only on the key.

Shape letters: E experts, F dense neurons, M neurons of an expert, S shared neurons, C clusters.
"""

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.moe import Method
from megatron_moe.experts import replicate, router, share, split
from megatron_moe.experts.balanced import assign, balanced_kmeans
from megatron_moe.experts.draws import BLOCK_NEURONS, Use, generator, normal_rows
from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.experts.recipe import Recipe

QUICK = settings(max_examples=60)
SEEDS = st.integers(0, 2**31)


def test_every_method_of_the_settings_has_a_row():
    assert set(METHODS) == set(get_args(Method))


def recipe(method="copy", *, experts=4, size=12, dense=48, **more) -> Recipe:
    defaults = {
        "seed": 0, "hidden_size": 8, "router_init_std": 0.02, "moe_layers": (0, 1, 2, 3),
    }  # fmt: skip
    return Recipe(
        method=method, num_experts=experts, expert_ffn_hidden_size=size,
        dense_ffn_hidden_size=dense, **defaults | more,
    )  # fmt: skip


@QUICK
@given(
    experts=st.integers(1, 8), size=st.integers(1, 20), shared=st.integers(0, 20), seed=SEEDS,
    layer=st.integers(0, 100),
)  # fmt: skip
def test_a_random_split_is_a_partition(experts, size, shared, seed, layer):
    dense = experts * size + shared
    recipe_ = recipe("split_random", experts=experts, size=size, dense=dense, seed=seed,
                   shared_size=shared)  # fmt: skip
    part, again = (split.random(recipe_, layer, Evidence()) for _ in range(2))
    assert part.neurons_EM.shape == (experts, size)
    assert sorted([*part.neurons_EM.ravel(), *part.shared_S]) == list(range(dense))
    assert (np.diff(part.neurons_EM, axis=1) > 0).all()
    np.testing.assert_array_equal(part.neurons_EM, again.neurons_EM)
    np.testing.assert_array_equal(part.shared_S, again.shared_S)


def test_qwens_shared_expert_has_whole_copies_and_a_part_of_one():
    recipe_ = recipe("qwen", experts=2, size=10, shared_size=100)
    counts_F = np.bincount(replicate.qwen(recipe_, 0, Evidence()).shared_S, minlength=48)
    assert sorted(set(counts_F)) == [2, 3]
    assert counts_F.sum() == 100


@QUICK
@given(experts=st.integers(1, 8), size=st.integers(1, 60), seed=SEEDS, layer=st.integers(0, 50))
def test_qwen_uses_each_copy_once_and_discards_the_rest(experts, size, seed, layer):
    dense = 48
    neurons_EM = replicate.qwen(
        recipe("qwen", experts=experts, size=size, seed=seed), layer, Evidence()
    ).neurons_EM
    assert neurons_EM.shape == (experts, size)
    copies, rest = divmod(experts * size, dense)
    counts_F = np.bincount(neurons_EM.ravel(), minlength=dense)
    assert set(counts_F) <= {copies, copies + 1}
    assert (counts_F == copies + 1).sum() == rest


@QUICK
@given(shards=st.integers(1, 8), replicas=st.integers(1, 4), seed=st.none() | SEEDS)
def test_granular_holds_the_dense_layer_once_a_replica(shards, replicas, seed):
    recipe_ = recipe("granular", experts=shards * replicas, size=6, dense=6 * shards,
                   permutation_seed=seed)  # fmt: skip
    neurons_EM = replicate.granular(recipe_, 3, Evidence()).neurons_EM
    for replica in neurons_EM.reshape(replicas, -1):
        assert sorted(replica) == list(range(6 * shards))
    assert (neurons_EM[:shards] == neurons_EM[-shards:]).all()


@QUICK
@given(seed=SEEDS, shared=st.integers(0, 12), size=st.integers(1, 12))
def test_sharing_takes_the_most_important(seed, shared, size):
    importance_EF = np.random.default_rng(seed).random((3, 24))
    sizes = {"experts": 3, "size": size, "dense": 24}
    evidence = Evidence(importance_CF=importance_EF)
    inner = share.sharing_inner(recipe("sharing_inner", **sizes), 0, evidence)
    for row_F, neurons_M in zip(importance_EF, inner.neurons_EM, strict=True):
        assert len(set(neurons_M)) == size
        left = np.delete(row_F, neurons_M)
        assert left.max(initial=0) <= row_F[neurons_M].min()
    recipe_ = recipe("sharing_inter", **sizes, shared_size=shared)
    inter = share.sharing_inter(recipe_, 0, evidence)
    assert len(set(inter.shared_S)) == shared
    counts_F = np.bincount(inner.neurons_EM.ravel(), minlength=24)
    if shared:
        assert np.delete(counts_F, inter.shared_S).max() <= counts_F[inter.shared_S].min()
    for row_F, neurons_M in zip(importance_EF, inter.neurons_EM, strict=True):
        assert not set(neurons_M) & set(inter.shared_S)
        left = np.delete(row_F, [*neurons_M, *inter.shared_S])
        assert left.max(initial=0) <= row_F[neurons_M].min()


def test_experts_that_want_the_same_neurons_share_them():
    importance_EF = np.array([[9, 8, 7, 1, 0, 0], [9, 8, 0, 0, 7, 1]], dtype=float)
    recipe_ = recipe("sharing_inter", experts=2, size=2, dense=6, shared_size=2)
    part = share.sharing_inter(recipe_, 0, Evidence(importance_CF=importance_EF))
    assert part.shared_S.tolist() == [0, 1]
    assert part.neurons_EM.tolist() == [[2, 3], [4, 5]]


def test_coactivation_groups_what_fires_together_and_shares_what_always_does():
    """Of 32 neurons, 8 serve every token, and each of 4 kinds of token uses 6 others."""
    rng = np.random.default_rng(0)
    kind_H = rng.integers(0, 4, 64)
    special_HF = np.repeat(np.eye(4)[kind_H], 6, axis=1) * rng.uniform(0.5, 1.5, (64, 24))
    contribution_HF = np.concatenate([special_HF, rng.uniform(0.9, 1.1, (64, 8))], axis=1)
    recipe_ = recipe("split_coactivation", experts=4, size=6, dense=32, shared_size=8)
    evidence = Evidence(contribution_HF=contribution_HF.astype(np.float32))
    part = share.coactivation(recipe_, 0, evidence)
    assert part.shared_S.tolist() == list(range(24, 32))
    assert sorted(map(tuple, part.neurons_EM)) == [tuple(range(6 * i, 6 * i + 6)) for i in range(4)]


def test_weaver_shares_the_even_and_groups_the_alike():
    even = np.full((4, 8), 3.0)
    special = np.kron(np.eye(4), np.ones((1, 6))) + 0.01
    activity_CF = np.concatenate([special, even], axis=1)
    recipe_ = recipe("weaver", experts=4, size=6, dense=32, shared_size=8)
    part = share.weaver(recipe_, 0, Evidence(activity_CF=activity_CF))
    assert part.shared_S.tolist() == list(range(24, 32))
    assert sorted(map(tuple, part.neurons_EM)) == [tuple(range(6 * i, 6 * i + 6)) for i in range(4)]


@QUICK
@given(seed=SEEDS)
def test_an_assignment_is_the_cheapest_of_all(seed):
    costs_XC = np.random.default_rng(seed).integers(0, 50, (6, 3))
    cluster_X, cost = assign(costs_XC)
    assert np.bincount(cluster_X, minlength=3).tolist() == [2, 2, 2]
    assert costs_XC[np.arange(6), cluster_X].sum() == cost
    every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    assert cost == min(costs_XC[np.arange(6), list(way)].sum() for way in every)


@QUICK
@given(seed=SEEDS, clusters=st.integers(1, 6), each=st.integers(1, 9))
def test_clusters_are_of_exactly_one_size(seed, clusters, each):
    rng = np.random.default_rng(seed)
    points_XD = rng.standard_normal((clusters * each, 5)).astype(np.float32)
    cluster_X = balanced_kmeans(points_XD, clusters, generator(seed, 0, Use.CLUSTERS))
    assert np.bincount(cluster_X, minlength=clusters).tolist() == [each] * clusters


def test_clusters_that_are_there_are_found():
    rng = np.random.default_rng(0)
    truth_X = np.repeat(np.arange(4), 50)
    points_XD = (np.eye(4)[truth_X] + 0.1 * rng.standard_normal((200, 4))).astype(np.float32)
    cluster_X = balanced_kmeans(points_XD, 4, generator(0, 0, Use.CLUSTERS))
    for cluster in range(4):
        assert len(set(truth_X[cluster_X == cluster])) == 1


def test_clustering_equal_points_ends():
    cluster_X = balanced_kmeans(np.ones((12, 3), dtype=np.float32), 3, np.random.default_rng(0))
    assert np.bincount(cluster_X).tolist() == [4, 4, 4]


@QUICK
@given(start=st.integers(0, 300), length=st.integers(1, 300), seed=SEEDS)
def test_a_run_of_neurons_has_the_numbers_it_has_in_the_whole(start, length, seed):
    key = (seed, 2, Use.NOISE, 1, 0)
    whole = normal_rows(*key, neurons=slice(0, 4 * BLOCK_NEURONS + 90), width=3)
    run = slice(start, start + length)
    np.testing.assert_array_equal(normal_rows(*key, neurons=run, width=3), whole[run])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_so_many_neurons_are_drawn_anew(ratio: float):
    layer = ExpertPlan(recipe("drop", size=48, reinit_ratio=ratio)).layer(2)
    if not ratio:
        assert layer.reinit_EM is None
        return
    assert layer.reinit_EM is not None
    assert (layer.reinit_EM.sum(axis=1) == round(48 * ratio)).all()
    if ratio < 1:
        assert len({mask.tobytes() for mask in layer.reinit_EM}) == 4, "experts must differ"


def rows(init: str, **more) -> np.ndarray:
    rows_ED = router.router_rows(recipe(router_init=init, hidden_size=4096, **more), 1)
    assert rows_ED is not None
    return rows_ED


def test_uniform_rows_have_the_std_asked_for_and_no_tails():
    drawn = rows("uniform", router_init_std=0.5)
    assert drawn.std() == pytest.approx(0.5, rel=0.02)
    assert np.abs(drawn).max() <= 0.5 * 3**0.5
    assert abs(drawn.mean()) < 0.02


def test_zero_rows_weigh_nothing_and_still_choose():
    drawn = rows("zero")
    assert 0 < np.abs(drawn).max() < 1e-5
    x_TD = np.random.default_rng(0).standard_normal((1000, 4096))
    chosen = np.bincount((x_TD @ drawn.T).argmax(axis=1), minlength=4)
    assert chosen.min() > 150, "every expert is chosen by some tokens"


def test_virtual_groups_repeat_a_row_for_each_shard():
    drawn = rows("virtual_groups", experts=6, size=16)
    assert (drawn.reshape(2, 3, -1) == drawn.reshape(2, 3, -1)[:, :1]).all()
    assert not (drawn[0] == drawn[3]).any()


def test_methods_differ_by_seed_and_layer():
    seen = {
        split.random(recipe("split_random", seed=seed), layer, Evidence()).neurons_EM.tobytes()
        for seed in range(4)
        for layer in range(4)
    }
    assert len(seen) == 16
