"""Resolve the settings of a configuration into a recipe.

Letters: N num_moe_experts, K moe_router_topk, F neurons of the dense layer, M neurons of an expert,
G = F / M granularity, R = N / G replicas of the dense layer.
"""

from __future__ import annotations

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.recipe import Recipe
from megatron_moe.hf.spec import ModelSpec

TWIN_NOISE_STD = 1e-3
"""Default noise on the weights of copies, a twentieth of the usual weights' 0.02."""


def make_recipe(spec: ModelSpec, moe: Moe, upcycle: Upcycle) -> Recipe:
    """Create the recipe of a configuration, for a source model of this shape."""
    size = spec.ffn_hidden_size if spec.experts is None else spec.experts.moe_ffn_hidden_size
    factor, calibrated = output_factor(spec, moe, upcycle)
    in_weights = upcycle.rescale_at == "weights"
    paper = METHODS[upcycle.method].experts == "shards" and upcycle.scale == "paper"
    third = factor ** (1 / 3)
    return Recipe(
        method=upcycle.method,
        seed=upcycle.seed,
        num_experts=moe.num_moe_experts,
        expert_ffn_hidden_size=moe.expert_size(spec.ffn_hidden_size),
        dense_ffn_hidden_size=size,
        hidden_size=spec.hidden_size,
        router_init_std=upcycle.router_init_std,
        moe_layers=moe_layer_ids(moe, spec.num_layers),
        shared_size=moe.shared_size,
        num_sources=1 + len(upcycle.mix_with),
        router_init=upcycle.router_init or METHODS[upcycle.method].router_init,
        weight_scales=(third,) * 3 if paper else (1.0, 1.0, factor if in_weights else 1.0),
        output_scale=1.0 if paper or in_weights else factor,
        calibrated=calibrated,
        rescale_at=upcycle.rescale_at if calibrated else "weights",
        reinit_ratio=_reinit_ratio(upcycle),
        noise_std=_noise_std(upcycle),
        permutation_seed=upcycle.permutation_seed,
        fit=tuple(sorted(set(upcycle.fit))),
        max_load=upcycle.max_load if "router" in upcycle.fit else 0.0,
        fit_stream=upcycle.fit_stream if "down" in upcycle.fit else 0.0,
        routing=_routing(moe) if upcycle.fit or calibrated else (),
        source_experts=0 if spec.experts is None else spec.experts.num_moe_experts,
        choose=chosen_by(upcycle),
        twins=twins_of(upcycle),
    )


def chosen_by(upcycle: Upcycle) -> str:
    """Return how experts of a MoE source are chosen: the setting, or the method's default."""
    return upcycle.choose or next(iter(METHODS[upcycle.method].choices), "even")


def twins_of(upcycle: Upcycle) -> str:
    """Return the difference between copies of an expert; empty if the method makes none."""
    return (upcycle.twins or "noise") if upcycle.method == "grow" else ""


def moe_layer_ids(moe: Moe, num_layers: int) -> tuple[int, ...]:
    """Return the ids of the layers that become MoE, ascending."""
    if moe.moe_layers != "all":
        return tuple(sorted(moe.moe_layers))
    return tuple(range(moe.first_dense_layers, num_layers - moe.last_dense_layers))


def output_factor(spec: ModelSpec, moe: Moe, upcycle: Upcycle) -> tuple[float, bool]:
    """Return the factor of the routed output, and whether a measured factor is requested.

    If the weights sum to one (topk_softmax), the output is an average over parts, but the dense
    layer is their sum: N restores it in expectation, and G exactly if whole replicas are chosen.
    With probabilities of all N experts (softmax_topk) and a uniform router, each weight is 1 / N.
    Parts of an expert of a MoE source: see `experts.finer`.
    """
    experts, topk = moe.num_moe_experts, moe.moe_router_topk
    if spec.experts is not None:  # parts of an expert have the combine weight of one in common
        splits = METHODS[upcycle.method].splits_experts
        return experts / spec.experts.num_moe_experts if splits else 1.0, False
    if METHODS[upcycle.method].experts == "shards":
        granularity = spec.ffn_hidden_size / moe.expert_size(spec.ffn_hidden_size)
        choice = upcycle.scale or "exact"
        if choice in ("exact", "paper"):
            if moe.router_order == "topk_softmax":
                return granularity, False
            return experts * granularity / topk, False
        return 1.0, choice == "calibrated"
    match upcycle.rescale or ("N/K" if METHODS[upcycle.method].sums_parts else "none"):
        case "N/K":
            return experts / topk, False
        case "N":
            return float(experts), False
        case rescale:
            return 1.0, rescale == "calibrated"


def _routing(moe: Moe) -> tuple[int | str, ...]:
    return moe.moe_router_topk, moe.router_order, moe.moe_router_score_function


def _noise_std(upcycle: Upcycle) -> float:
    if upcycle.noise_std is None:
        return TWIN_NOISE_STD if twins_of(upcycle) == "noise" else 0.0
    return upcycle.noise_std


def _reinit_ratio(upcycle: Upcycle) -> float:
    if upcycle.reinit_ratio is not None:
        return upcycle.reinit_ratio
    return METHODS[upcycle.method].reinit_ratio
