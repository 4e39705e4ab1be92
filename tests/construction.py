"""Every way of building experts, once: settings that a tiny dense model takes.

The dense model has F = 96 neurons a layer. What measured methods would have measured is drawn.
"""

from typing import Any

import numpy as np
import torch

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.construct.solve import LayerMeasurements, layer_table
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.experts.recipe import Recipe
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.hf.spec import ModelSpec

PLAN = "plan.safetensors"
COPY = {"num_moe_experts": 4}
SPLIT = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24}
SHARED = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16}
SHARED["moe_shared_expert_intermediate_size"] = 32

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # moe, upcycle
    "copy": (COPY, {"permutation_seed": 3}),
    "copy-noise": (COPY, {"noise_std": 0.01, "router_init": "zero"}),
    "drop": (COPY, {"method": "drop"}),
    "granular": (
        {"num_moe_experts": 4, "moe_ffn_hidden_size": 48},
        {"method": "granular", "permutation_seed": 5},
    ),
    "granular-paper-drop": (
        {"num_moe_experts": 4, "moe_ffn_hidden_size": 48},
        {"method": "granular", "scale": "paper", "reinit_ratio": 0.25},
    ),
    "split_random": (SPLIT, {"method": "split_random", "router_init": "gate_mean"}),
    "split_random-shared": (SHARED, {"method": "split_random", "rescale_at": "runtime"}),
    "split_clustered": (SPLIT, {"method": "split_clustered", "rescale": "N"}),
    "split_clustered-shared": (SHARED, {"method": "split_clustered"}),
    "split_coactivation": (SHARED, {"method": "split_coactivation", "plan": PLAN}),
    "split_routed": (SPLIT, {"method": "split_routed", "plan": PLAN, "fit": ["router"]}),
    "sharing_inner": (
        {"num_moe_experts": 4, "moe_ffn_hidden_size": 32},
        {"method": "sharing_inner", "plan": PLAN, "router_init": "centroids"},
    ),
    "sharing_inter": (SHARED, {"method": "sharing_inter", "plan": PLAN, "rescale": "calibrated"}),
    "qwen": ({"num_moe_experts": 4, "moe_ffn_hidden_size": 40}, {"method": "qwen"}),
    "qwen-shared": (  # a shared expert of more neurons than the FFN has
        {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 40,
            "moe_shared_expert_intermediate_size": 112,
        },
        {"method": "qwen"},
    ),
    "weaver": (SHARED, {"method": "weaver", "plan": PLAN}),
    "mix": (COPY, {"method": "mix", "mix_with": ["other"]}),
}


def settings(case: str) -> tuple[Moe, Upcycle]:
    moe, upcycle = CASES[case]
    return Moe(**moe), Upcycle.model_validate(upcycle, strict=False)


def make_plan(spec: ModelSpec, moe: Moe, upcycle: Upcycle, dense: SourceCheckpoint) -> ExpertPlan:
    """The case's plan, with tables from drawn measurements where it needs them."""
    plan = make_expert_plan(spec, moe, upcycle)
    recipe = plan.recipe
    if plan.needs == "nothing":
        return plan
    return plan.with_tables({
        layer: layer_table(plan, layer, drawn_measurements(recipe, layer), dense, moe)
        for layer in recipe.moe_layers
    })  # fmt: skip


def drawn_measurements(recipe: Recipe, layer: int) -> LayerMeasurements:
    drawn = np.random.default_rng(layer)
    importance_EF = drawn.random((recipe.num_experts, recipe.dense_ffn_hidden_size))
    inputs_TD = drawn.standard_normal((64, recipe.hidden_size)).astype(np.float32)
    return LayerMeasurements(torch.from_numpy(inputs_TD), importance_EF, importance_EF)
