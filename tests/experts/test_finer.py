"""Parts of the experts of a MoE: each neuron once, and other parts in each expert."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_moe.experts.methods import ffns_of_layer, partition
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.experts.recipe import Recipe

RECIPE = Recipe(
    method="split_random", seed=3, num_experts=12, expert_ffn_hidden_size=8,
    dense_ffn_hidden_size=32, hidden_size=6, router_init_std=0.1, moe_layers=(0, 1),
    source_experts=3, shared_size=5, weight_scales=(1.0, 1.0, 4.0),
)  # fmt: skip


def test_each_neuron_of_each_expert_is_in_one_part():
    plan = ExpertPlan(RECIPE).layer(1)
    assert plan.expert_E is not None
    assert plan.expert_E.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for expert_4M in plan.neurons_EM.reshape(3, 4, 8):
        assert sorted(expert_4M.flatten()) == list(range(32))
    assert plan.shared_S.tolist() == [0, 1, 2, 3, 4]
    assert plan.router_ED is None, "rows are those of the source"
    first_4M, second_4M, third_4M = plan.neurons_EM.reshape(3, 4, 8)
    assert not np.array_equal(first_4M, second_4M)
    assert not np.array_equal(second_4M, third_4M)
    assert not np.array_equal(plan.neurons_EM, ExpertPlan(RECIPE).layer(0).neurons_EM)


def test_clusters_are_those_of_each_expert():
    """Rows of up point into 4 directions, in another order in each expert."""
    recipe = replace(RECIPE, method="split_clustered")
    assert ffns_of_layer(recipe) == 3
    rng = np.random.default_rng(0)
    kind_OM = np.stack([rng.permutation(np.repeat(np.arange(4), 8)) for _ in range(3)])
    up_OMD = np.eye(6, dtype=np.float32)[kind_OM] + 0.01 * rng.random((3, 32, 6), dtype=np.float32)
    part = partition(recipe, 0, [Evidence(up_FD=up_MD) for up_MD in up_OMD])
    assert part.expert_E is not None
    for expert, neurons_M in zip(part.expert_E, part.neurons_EM, strict=True):
        assert len(set(kind_OM[expert, neurons_M])) == 1


@pytest.mark.parametrize("method", ["split_random", "split_clustered"])
def test_a_dense_layer_is_one_ffn(method):
    assert ffns_of_layer(replace(RECIPE, method=method, source_experts=0)) == 1
    assert ffns_of_layer(replace(RECIPE, method="grow")) == 1
