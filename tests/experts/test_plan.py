"""A plan is a function of (method, seed, layer), and its hash identifies it."""

from dataclasses import fields, replace

import numpy as np
import pytest

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan, moe_layer_ids
from megatron_moe.experts.recipe import Recipe
from megatron_moe.hf.spec import spec_from_config

SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 6,
        "hidden_size": 1024,
        "intermediate_size": 40,
        "num_attention_heads": 8,
        "vocab_size": 64,
    }
)

OTHER_VALUES = {
    "method": "drop",
    "seed": 8,
    "num_experts": 5,
    "expert_ffn_hidden_size": 20,
    "dense_ffn_hidden_size": 80,
    "hidden_size": 512,
    "router_init_std": 0.03,
    "moe_layers": (0, 1, 2, 3, 4),
    "shared_size": 8,
    "num_sources": 2,
    "router_init": "uniform",
    "weight_scales": (1.0, 1.0, 2.0),
    "output_scale": 2.0,
    "calibrated": True,
    "rescale_at": "runtime",
    "reinit_ratio": 0.5,
    "noise_std": 0.1,
    "source_experts": 2,
    "choose": "load",
    "twins": "noise",
    "permutation_seed": 0,
    "fit": ("down",),
    "max_load": 1.5,
    "fit_stream": 0.5,
    "routing": (2, "topk_softmax", "softmax"),
}


def make(seed: int = 7, std: float = 0.02, **moe: object) -> ExpertPlan:
    upcycle = Upcycle(seed=seed, router_init_std=std)
    return make_expert_plan(SPEC, Moe(**{"num_moe_experts": 4} | moe), upcycle)


def test_copy_gives_every_expert_every_neuron_once():
    plan = make()
    for layer in plan.recipe.moe_layers:
        neurons_EM = plan.layer(layer).neurons_EM
        assert neurons_EM.shape == (4, 40)
        for neurons_M in neurons_EM:
            assert sorted(neurons_M) == list(range(40))


def test_the_same_settings_give_the_same_plan():
    one, other = make(), make()
    assert one.hash == other.hash
    for layer in one.recipe.moe_layers:
        first, second = one.layer(layer), other.layer(layer)
        np.testing.assert_array_equal(first.neurons_EM, second.neurons_EM)
        np.testing.assert_array_equal(first.router_ED, second.router_ED)


def test_a_layer_does_not_depend_on_which_layers_were_asked_before():
    forward, backward, alone = make(), make(), make(moe_layers=[4])
    rows = {layer: forward.layer(layer).router_ED for layer in range(6)}
    for layer in reversed(range(6)):
        np.testing.assert_array_equal(backward.layer(layer).router_ED, rows[layer])
    np.testing.assert_array_equal(alone.layer(4).router_ED, rows[4])


def test_seeds_layers_and_experts_draw_different_rows():
    routers = [
        *(make().layer(layer).router_ED for layer in range(6)),
        *(make(seed=seed).layer(0).router_ED for seed in (0, 1, 8)),
    ]
    rows = np.concatenate(routers)
    assert len(np.unique(rows[:, 0])) == len(rows)
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.2, "the noise of 1024 numbers per row is 0.03"


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_router_rows_are_normal_with_the_std_asked_for(std: float):
    rows = np.stack([make(std=std).layer(layer).router_ED for layer in range(6)])
    assert rows.dtype == np.float32
    assert rows.std() == pytest.approx(std, rel=0.02)
    assert abs(rows.mean()) < 0.03 * std
    within_one = (np.abs(rows) < std).mean()
    assert within_one == pytest.approx(0.683, abs=0.01)


def test_a_router_of_std_zero_prefers_no_expert():
    assert not make(std=0.0).layer(0).router_ED.any()


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_the_hash_changes_with_every_field(field: str):
    plan = make()
    changed = replace(plan.recipe, **{field: OTHER_VALUES[field]})
    assert getattr(plan.recipe, field) != OTHER_VALUES[field]
    assert ExpertPlan(changed).hash != plan.hash


def test_the_hash_changes_with_every_table():
    plan = make()
    tables = [
        LayerTable(neurons_EM=np.zeros((4, 40), dtype=np.int64)),
        LayerTable(shared_S=np.zeros(4, dtype=np.int64)),
        LayerTable(router_ED=np.zeros((4, 1024), dtype=np.float32)),
        LayerTable(output_scale=2.0),
    ]
    plans = [plan, *(plan.with_tables({layer: t}) for t in tables for layer in (0, 1))]
    assert len({plan.hash for plan in plans}) == len(plans)


def test_the_hash_is_the_same_in_every_version():
    """Checkpoints store the hash: if it changed, no older run could resume."""
    assert make().hash == "4253b36c627b6d2f9cd90aa69d5dbf31a3cd188824755026de3837e8b5373d33"


@pytest.mark.parametrize(
    ("asked", "ids"),
    [("all", (0, 1, 2, 3, 4, 5)), ([5, 0, 3], (0, 3, 5)), ([], ())],
    ids=["all", "unordered", "none"],
)
def test_moe_layer_ids_ascend(asked: object, ids: tuple[int, ...]):
    assert moe_layer_ids(Moe(num_moe_experts=2, moe_layers=asked), 6) == ids


def test_an_experts_size_is_the_dense_layers_unless_set():
    assert make().recipe.expert_ffn_hidden_size == 40
    assert make(moe_ffn_hidden_size=10).recipe.expert_ffn_hidden_size == 10


def test_first_and_last_layers_stay_dense():
    moe = Moe(num_moe_experts=2, first_dense_layers=1, last_dense_layers=2)
    assert moe_layer_ids(moe, 6) == (1, 2, 3)
