"""The recipe of an ExpertPlan: the settings for building experts, with all defaults resolved.

An ExpertPlan consists of a recipe and, for methods that measure, one table per layer.

Letters: N num_moe_experts, K moe_router_topk, F neurons of the dense layer, M neurons of an expert,
G = F / M granularity, R = N / G replicas of the dense layer.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron_moe.config.run import Method, Moe, RouterInit, Upcycle
from megatron_moe.hf.spec import DenseSpec

SCHEMA = 1

NEEDS_WEIGHTS: frozenset[Method] = frozenset({"split_clustered"})
"""Methods that depend on the dense weights; computed at the start of a run."""

NEEDS_MEASURING: frozenset[Method] = frozenset({"sharing_inner", "sharing_inter", "weaver"})
"""Methods that depend on activations of the dense model, measured by `megatron-moe construct`."""

_SUMS_PARTS = ("split_random", "split_clustered", "sharing_inner", "sharing_inter", "weaver")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All inputs of a plan's layers, except for the tables."""

    method: Method
    seed: int
    num_experts: int
    expert_ffn_hidden_size: int
    dense_ffn_hidden_size: int
    hidden_size: int
    router_init_std: float
    moe_layers: tuple[int, ...]
    # The following fields enter the hash only if they differ from their defaults, so that plans
    # that do not use a field keep the hash they had before it was added.
    shared_size: int = 0
    """Neurons of the shared expert."""
    num_sources: int = 1
    """Number of dense checkpoints, from which experts are taken in turn."""
    router_init: RouterInit = "normal"
    weight_scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of gate, up and down of every routed expert."""
    output_scale: float = 1.0
    """Factor of the routed experts' output at run time."""
    calibrated: bool = False
    """Whether a factor measured for each layer is multiplied in."""
    rescale_at: str = "weights"
    """Target of the measured factor: ``weights`` (down) or ``runtime`` (the output)."""
    reinit_ratio: float = 0.0
    noise_std: float = 0.0
    permutation_seed: int | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether tables must be computed from the dense weights."""
        return self.method in NEEDS_WEIGHTS

    @property
    def needs_measuring(self) -> bool:
        """Whether tables must be measured by running the dense model."""
        return self.method in NEEDS_MEASURING or self.router_init == "centroids" or self.calibrated

    def content(self) -> dict[str, Any]:
        """Return the values that are hashed and stored in a plan file."""
        return {
            "schema": SCHEMA,
            **{
                f.name: getattr(self, f.name)
                for f in fields(self)
                if f.default is MISSING or getattr(self, f.name) != f.default
            },
        }


def make_recipe(spec: DenseSpec, moe: Moe, upcycle: Upcycle) -> Recipe:
    """Create the recipe of a configuration, for a dense model of this shape."""
    factor, calibrated = output_factor(spec, moe, upcycle)
    in_weights = upcycle.rescale_at == "weights"
    paper = upcycle.method == "granular" and upcycle.scale == "paper"
    third = factor ** (1 / 3)
    return Recipe(
        method=upcycle.method,
        seed=upcycle.seed,
        num_experts=moe.num_moe_experts,
        expert_ffn_hidden_size=moe.expert_size(spec.ffn_hidden_size),
        dense_ffn_hidden_size=spec.ffn_hidden_size,
        hidden_size=spec.hidden_size,
        router_init_std=upcycle.router_init_std,
        moe_layers=moe_layer_ids(moe, spec.num_layers),
        shared_size=moe.shared_size,
        num_sources=1 + len(upcycle.mix_with),
        router_init=upcycle.router_init or _ROUTERS.get(upcycle.method, "normal"),
        weight_scales=(third,) * 3 if paper else (1.0, 1.0, factor if in_weights else 1.0),
        output_scale=1.0 if paper or in_weights else factor,
        calibrated=calibrated,
        rescale_at=upcycle.rescale_at if calibrated else "weights",
        reinit_ratio=_reinit_ratio(upcycle),
        noise_std=upcycle.noise_std,
        permutation_seed=upcycle.permutation_seed,
    )


def moe_layer_ids(moe: Moe, num_layers: int) -> tuple[int, ...]:
    """Return the ids of the layers that become MoE, ascending."""
    if moe.moe_layers != "all":
        return tuple(sorted(moe.moe_layers))
    return tuple(range(moe.first_dense_layers, num_layers - moe.last_dense_layers))


def output_factor(spec: DenseSpec, moe: Moe, upcycle: Upcycle) -> tuple[float, bool]:
    """Return the factor of the routed output, and whether a measured factor is requested.

    If the weights sum to one (topk_softmax), the output is an average over parts, but the dense
    layer is their sum: N restores it in expectation, and G exactly if whole replicas are chosen.
    With probabilities of all N experts (softmax_topk) and a uniform router, each weight is 1 / N.
    """
    experts, topk = moe.num_moe_experts, moe.moe_router_topk
    if upcycle.method == "granular":
        granularity = spec.ffn_hidden_size / moe.expert_size(spec.ffn_hidden_size)
        choice = upcycle.scale or "exact"
        if choice in ("exact", "paper"):
            if moe.router_order == "topk_softmax":
                return granularity, False
            return experts * granularity / topk, False
        return 1.0, choice == "calibrated"
    match upcycle.rescale or ("N/K" if upcycle.method in _SUMS_PARTS else "none"):
        case "N/K":
            return experts / topk, False
        case "N":
            return float(experts), False
        case rescale:
            return 1.0, rescale == "calibrated"


_ROUTERS: dict[Method, RouterInit] = {
    "granular": "virtual_groups",
    "drop": "uniform",
    "weaver": "gate_mean",
}


def _reinit_ratio(upcycle: Upcycle) -> float:
    if upcycle.reinit_ratio is not None:
        return upcycle.reinit_ratio
    return 0.5 if upcycle.method in ("drop", "qwen") else 0.0
