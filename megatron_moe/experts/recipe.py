"""What the configuration says about building experts, with every default and factor worked out.

A recipe and, for methods that measure, a table a layer are all there is to an ExpertPlan.

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
"""Methods that look at the dense weights; done at the start of a run."""

NEEDS_MEASURING: frozenset[Method] = frozenset({"sharing_inner", "sharing_inter", "weaver"})
"""Methods that look at the dense model at work: `megatron-moe construct`."""

_SUMS_PARTS = ("split_random", "split_clustered", "sharing_inner", "sharing_inter", "weaver")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the layers of a plan are derived from, tables aside."""

    method: Method
    seed: int
    num_experts: int
    expert_ffn_hidden_size: int
    dense_ffn_hidden_size: int
    hidden_size: int
    router_init_std: float
    moe_layers: tuple[int, ...]
    # What follows counts in the hash only where it is not the default, so that plans that do
    # without keep the hash they had before it existed.
    shared_size: int = 0
    """Neurons of the always-on expert."""
    num_sources: int = 1
    """Dense checkpoints that experts come from, in turn."""
    router_init: RouterInit = "normal"
    weight_scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of gate, up and down of every routed expert."""
    output_scale: float = 1.0
    """Factor of the routed experts' output at run time."""
    calibrated: bool = False
    """A factor measured for each layer comes on top."""
    rescale_at: str = "weights"
    """Where the measured factor goes: into down, or to the output at run time."""
    reinit_ratio: float = 0.0
    noise_std: float = 0.0
    permutation_seed: int | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether a table must be made from the dense weights."""
        return self.method in NEEDS_WEIGHTS

    @property
    def needs_measuring(self) -> bool:
        """Whether a table must be measured with the dense model at work."""
        return self.method in NEEDS_MEASURING or self.router_init == "centroids" or self.calibrated

    def content(self) -> dict[str, Any]:
        """What a hash is taken of and a plan file holds."""
        return {
            "schema": SCHEMA,
            **{
                f.name: getattr(self, f.name)
                for f in fields(self)
                if f.default is MISSING or getattr(self, f.name) != f.default
            },
        }


def make_recipe(spec: DenseSpec, moe: Moe, upcycle: Upcycle) -> Recipe:
    """The recipe that the configuration asks for, for a dense model of this shape."""
    factor, calibrated = output_factor(spec, moe, upcycle)
    in_weights = upcycle.rescale_at == "weights"
    paper = upcycle.method == "granular" and upcycle.scale == "paper"
    third = factor ** (1 / 3)
    return Recipe(
        method=upcycle.method,
        seed=upcycle.seed,
        num_experts=moe.num_moe_experts,
        expert_ffn_hidden_size=moe.moe_ffn_hidden_size or spec.ffn_hidden_size,
        dense_ffn_hidden_size=spec.ffn_hidden_size,
        hidden_size=spec.hidden_size,
        router_init_std=upcycle.router_init_std,
        moe_layers=moe_layer_ids(moe, spec.num_layers),
        shared_size=moe.moe_shared_expert_intermediate_size or 0,
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
    """Ids of the layers that become MoE, ascending."""
    if moe.moe_layers != "all":
        return tuple(sorted(moe.moe_layers))
    return tuple(range(moe.first_dense_layers, num_layers - moe.last_dense_layers))


def output_factor(spec: DenseSpec, moe: Moe, upcycle: Upcycle) -> tuple[float, bool]:
    """By how much the routed output is multiplied, and whether a measured factor is asked for.

    With weights that sum to one (topk_softmax), the output of parts is an average where the dense
    layer has a sum: N restores it in expectation, G exactly when whole replicas are chosen. With
    probabilities of all N experts (softmax_topk) and a uniform router, each weight is 1 / N.
    """
    experts, topk = moe.num_moe_experts, moe.moe_router_topk
    if upcycle.method == "granular":
        granularity = spec.ffn_hidden_size / (moe.moe_ffn_hidden_size or spec.ffn_hidden_size)
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
