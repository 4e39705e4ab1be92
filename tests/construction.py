"""Every way of building experts, once: settings that a tiny dense model takes.

The dense model has F = 96 neurons a layer. What measured methods would have measured is drawn.
"""

from typing import Any

import numpy as np

from megatron_moe.config.run import Moe, Upcycle
from megatron_moe.experts import share, split
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan
from megatron_moe.hf.reader import DenseCheckpoint
from megatron_moe.hf.spec import DenseSpec

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
    "sharing_inner": (
        {"num_moe_experts": 4, "moe_ffn_hidden_size": 32},
        {"method": "sharing_inner", "plan": PLAN, "router_init": "centroids"},
    ),
    "sharing_inter": (SHARED, {"method": "sharing_inter", "plan": PLAN, "rescale": "calibrated"}),
    "qwen": ({"num_moe_experts": 4, "moe_ffn_hidden_size": 40}, {"method": "qwen"}),
    "weaver": (SHARED, {"method": "weaver", "plan": PLAN}),
    "mix": (COPY, {"method": "mix", "mix_with": ["other"]}),
}


def settings(case: str) -> tuple[Moe, Upcycle]:
    moe, upcycle = CASES[case]
    return Moe(**moe), Upcycle.model_validate(upcycle, strict=False)


def make_plan(spec: DenseSpec, moe: Moe, upcycle: Upcycle, dense: DenseCheckpoint) -> ExpertPlan:
    """The case's plan, with tables from drawn measurements where it needs them."""
    plan = make_expert_plan(spec, moe, upcycle)
    recipe = plan.recipe
    if not (recipe.needs_measuring or recipe.needs_weights):
        return plan
    return plan.with_tables({layer: drawn_table(plan, layer, dense) for layer in recipe.moe_layers})


def drawn_table(plan: ExpertPlan, layer: int, dense: DenseCheckpoint) -> LayerTable:
    recipe = plan.recipe
    drawn = np.random.default_rng(layer)
    importance_EF = drawn.random((recipe.num_experts, recipe.dense_ffn_hidden_size))
    size, shared = recipe.expert_ffn_hidden_size, recipe.shared_size
    match recipe.method:
        case "split_clustered":
            up = dense.read(f"model.layers.{layer}.mlp.up_proj.weight").float().numpy()
            part = split.clustered(recipe, layer, up)
        case "sharing_inner":
            part = share.sharing_inner(importance_EF, size=size)
        case "sharing_inter":
            part = share.sharing_inter(importance_EF, size=size, shared=shared)
        case "weaver":
            part = share.weaver(recipe, layer, importance_EF)
        case _:
            part = None
    rows = drawn.standard_normal((recipe.num_experts, recipe.hidden_size)).astype(np.float32)
    return LayerTable(
        neurons_EM=part.neurons_EM if part else None,
        shared_S=part.shared_S if part else None,
        router_ED=rows if recipe.router_init == "centroids" else None,
        output_scale=1.5 if recipe.calibrated else None,
    )
