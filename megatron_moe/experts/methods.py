"""List the construction methods, one row each: what it needs, its rules and its defaults.

Recipe, rules, plan and `megatron-moe construct` read these rows; nothing else tells methods apart.
`docs/extending.md` adds a method step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.moe import Method, RouterInit
from megatron_moe.experts import replicate, reuse, share, split
from megatron_moe.experts.finer import parts_of_experts
from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe

Needs = Literal["nothing", "weights", "text"]
"""Input of a plan besides its recipe. weights: the dense weights, read when a run starts. text: the
dense model's activations, measured by `megatron-moe construct`."""

Experts = Literal["whole", "shards", "parts", "subsets", "pieces"]
"""Relation between the experts and the dense FFN. whole: each is all of it. shards: equal shards,
in whole replicas. parts: each neuron goes to one expert. subsets: experts choose neurons, and may
choose the same. pieces: of shuffled copies, of any size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One construction method."""

    partition: Callable[[Recipe, int, Evidence], Partition]
    """Function of recipe, layer id and evidence that chooses the neurons of each expert."""
    experts: Experts
    needs: Needs = "nothing"
    by_cluster: bool = False
    """Whether the text must be measured by cluster, which takes a backward pass."""
    routed: bool = False
    """Whether neurons then change experts in turns with a router, so that a router must be fitted
    (`construct/routed.py`)."""
    shared: Literal["none", "optional", "required"] = "none"
    """Whether the method can fill a shared expert, or must."""
    without_shared: Method | None = None
    """Nearest method without a shared expert, if this one requires it."""
    choices: tuple[str, ...] = ()
    """Values of ``upcycle.choose``, the default first, for a method that takes its experts from a
    MoE source; empty for a method that splits or copies a dense FFN."""
    several_sources: bool = False
    """Whether experts come from several dense models (``upcycle.mix_with``)."""
    router_init: RouterInit = "normal"
    """Default of ``upcycle.router_init``."""
    reinit_ratio: float = 0.0
    """Default of ``upcycle.reinit_ratio``."""

    @property
    def sums_parts(self) -> bool:
        """Whether the dense output is a sum over experts, so that K of N are N/K too small."""
        return self.experts in ("parts", "subsets")

    @property
    def splits_experts(self) -> bool:
        """Whether the method also splits each expert of a MoE source."""
        return self.experts == "parts" and self.needs != "text"

    @property
    def by_position(self) -> bool:
        """Whether experts take the neurons in order, which ``permutation_seed`` can change."""
        return self.experts in ("whole", "shards") and not self.of_moe

    @property
    def of_moe(self) -> bool:
        """Whether the source is a MoE model."""
        return bool(self.choices)


METHODS: dict[Method, MethodRow] = {
    "copy": MethodRow(partition=replicate.copy, experts="whole"),
    "drop": MethodRow(
        partition=replicate.copy, experts="whole", router_init="uniform", reinit_ratio=0.5
    ),
    "granular": MethodRow(
        partition=replicate.granular, experts="shards", router_init="virtual_groups"
    ),
    "split_random": MethodRow(partition=split.random, experts="parts", shared="optional"),
    "split_clustered": MethodRow(
        partition=split.clustered, experts="parts", needs="weights", shared="optional"
    ),
    "split_coactivation": MethodRow(
        partition=share.coactivation, experts="parts", needs="text", shared="optional"
    ),
    "split_routed": MethodRow(
        partition=share.coactivation, experts="parts", needs="text", shared="optional", routed=True
    ),
    "sharing_inner": MethodRow(
        partition=share.sharing_inner, experts="subsets", needs="text", by_cluster=True
    ),
    "sharing_inter": MethodRow(
        partition=share.sharing_inter, experts="subsets", needs="text", by_cluster=True,
        shared="required", without_shared="sharing_inner",
    ),
    "qwen": MethodRow(
        partition=replicate.qwen, experts="pieces", shared="optional", reinit_ratio=0.5
    ),
    "weaver": MethodRow(
        partition=share.weaver, experts="parts", needs="text", by_cluster=True, shared="required",
        without_shared="split_clustered", router_init="gate_mean",
    ),
    "mix": MethodRow(partition=replicate.copy, experts="whole", several_sources=True),
    "keep": MethodRow(partition=reuse.keep, experts="whole", choices=("even",)),
    "grow": MethodRow(
        partition=reuse.grow, experts="whole", choices=("even", "load", "utility")
    ),
    "prune": MethodRow(
        partition=reuse.prune, experts="whole", choices=("reap", "load", "merge", "even")
    ),
}  # fmt: skip


def partition(recipe: Recipe, layer: int, evidence: Sequence[Evidence]) -> Partition:
    """Return the neurons of the experts of a layer.

    Args:
        recipe: Recipe of the plan.
        layer: Global layer id.
        evidence: Evidence about the layer, or about each expert of a MoE source to split.
    """
    row = METHODS[recipe.method]
    if recipe.source_experts and row.splits_experts:
        return parts_of_experts(row.partition, recipe, layer, evidence)
    return row.partition(recipe, layer, evidence[0])


def ffns_of_layer(recipe: Recipe) -> int:
    """Return the number of source FFNs of a layer that `partition` gets evidence about."""
    return max(recipe.source_experts, 1) if METHODS[recipe.method].splits_experts else 1


def needs(recipe: Recipe) -> Needs:
    """Return what a plan of this recipe needs: its method, router, scale or fit may need text."""
    return "text" if recipe.fit else measures(recipe)


def measures(recipe: Recipe) -> Needs:
    """Return what a plan of this recipe needs before anything is fitted."""
    if recipe.router_init == "centroids" or recipe.calibrated or recipe.choose != "even":
        return "text"
    return METHODS[recipe.method].needs
