"""The ExpertPlan: the source neurons of each expert, their scales, and the initial router rows.

A SwiGLU layer is a sum over its neurons (row of gate, row of up, column of down). An expert is
therefore a list of neurons, and every construction method is another list. A plan is derived from
(method, seed, layer) alone: each rank computes the part it needs, without communication. Methods
that depend on weights or activations store their results in one table per layer. Neurons are those
of a dense FFN or those of one expert of a MoE source.

Shape letters of this module:

    E  num_moe_experts          D  hidden_size
    F  ffn_hidden_size (dense)  M  moe_ffn_hidden_size, the neurons of one expert
    O  experts of a MoE source  S  neurons of the shared expert
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.experts import replicate, reuse
from megatron_moe.experts.draws import Use, generator
from megatron_moe.experts.merge import Merge
from megatron_moe.experts.methods import METHODS, Needs, ffns_of_layer, needs, partition
from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe
from megatron_moe.experts.resolve import make_recipe, moe_layer_ids
from megatron_moe.experts.router import router_rows
from megatron_moe.hf.spec import ModelSpec

__all__ = ["ExpertPlan", "LayerPlan", "LayerTable", "make_expert_plan", "moe_layer_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Values of a layer that cannot be derived from the recipe; None for those that can."""

    neurons_EM: NDArray[np.int64] | None = None
    shared_S: NDArray[np.int64] | None = None
    expert_E: NDArray[np.int64] | None = None
    """Source expert of each expert, for a MoE source whose experts are chosen by a measurement or
    split by their weights."""
    into_O: NDArray[np.int64] | None = None
    """Merged experts of a MoE source: see `experts.merge.Merge`, as the next two."""
    weight_O: NDArray[np.float64] | None = None
    order_OM: NDArray[np.int64] | None = None
    router_ED: NDArray[np.float32] | None = None
    output_scale: float | None = None
    """Factor that scales the routed output to the magnitude of the dense layer's."""
    down_hash: str | None = None
    """sha256 of the layer's solved ``down`` (`experts.solved`)."""


_HASHED = (
    "neurons_EM", "shared_S", "expert_E", "into_O", "weight_O", "order_OM", "router_ED",
    "output_scale",
)  # fmt: skip
"""Arrays of a table that are hashed if they are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Experts of one layer."""

    neurons_EM: NDArray[np.int64]
    """Index of the dense neuron that each neuron of each expert copies."""

    shared_S: NDArray[np.int64]
    """Dense neurons of the shared expert; empty if there is none."""

    source_E: NDArray[np.int64]
    """Index of the dense checkpoint of each expert."""

    expert_E: NDArray[np.int64] | None
    """Source expert of each expert; None for a dense source."""

    merge: Merge | None
    """Source experts of which each expert is the mean, if there are several."""

    reinit_EM: NDArray[np.bool_] | None
    """Neurons to reinitialize, with the mean and std of those they replace; None if none."""

    reinit_S: NDArray[np.bool_] | None
    """Neurons of the shared expert to reinitialize; None if none."""

    weight_scales: tuple[float, float, float]
    """Factors of gate, up and down of the routed experts."""

    output_scale: float
    """Factor of the routed experts' output at run time."""

    router_ED: NDArray[np.float32] | None
    """Initial rows of the router; None uses the mean of the expert's rows of gate, or the rows of a
    MoE source."""


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Construction of every MoE layer of the model, computed one layer at a time."""

    recipe: Recipe
    tables: Mapping[int, LayerTable] = field(default_factory=dict)
    """Tables by layer, for recipes that need them."""
    solved: Path | None = None
    """Folder of the solved ``down`` matrices; None if there are none, or a model that holds them
    was saved already."""

    def layer(self, layer: int) -> LayerPlan:
        """Return the experts of layer ``layer``, counted from 0 over the whole model."""
        recipe, table = self.recipe, self.tables.get(layer, LayerTable())
        part = _partition(recipe, layer, table)
        down, runtime = recipe.weight_scales[2], recipe.output_scale
        if table.down_hash is not None:
            down, runtime = 1.0, 1.0  # the solution holds the factor
        if recipe.calibrated:
            assert table.output_scale is not None, f"layer {layer} was not calibrated"
            down *= table.output_scale if recipe.rescale_at == "weights" else 1.0
            runtime *= table.output_scale if recipe.rescale_at == "runtime" else 1.0
        return LayerPlan(
            neurons_EM=part.neurons_EM,
            shared_S=part.shared_S,
            source_E=replicate.source_of_experts(recipe),
            expert_E=part.expert_E,
            merge=_merge(table),
            reinit_EM=_reinit_masks(recipe, layer) if recipe.reinit_ratio else None,
            reinit_S=_shared_mask(recipe, layer),
            weight_scales=(*recipe.weight_scales[:2], down),
            output_scale=runtime,
            router_ED=_router_rows(recipe, layer, table),
        )

    @property
    def needs(self) -> Needs:
        """Input besides the recipe; unless nothing, the plan has one table per layer."""
        return needs(self.recipe)

    def with_tables(
        self, tables: Mapping[int, LayerTable], solved: Path | None = None
    ) -> ExpertPlan:
        """Return a plan with the same recipe and these tables."""
        return replace(self, tables=tables, solved=solved)

    @property
    def solved_layers(self) -> list[int]:
        """Layers whose ``down`` matrices were solved for; their values are in `solved`."""
        return [layer for layer, table in self.tables.items() if table.down_hash is not None]

    @property
    def hash(self) -> str:
        """sha256 of the recipe and the tables: equal plans have equal hashes."""
        return hash_of(self.recipe.content(), self.tables)


def hash_of(recipe: Mapping[str, Any], tables: Mapping[int, LayerTable]) -> str:
    """Return the hash of the plan with this `Recipe.content` and these tables."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for layer in sorted(tables):
        table = tables[layer]
        for name in _HASHED:
            if (value := getattr(table, name)) is not None:
                values = np.ascontiguousarray(value)
                digest.update(f"{layer} {name} {values.dtype} {values.shape}".encode())
                digest.update(values.tobytes())
        if table.down_hash is not None:
            digest.update(f"{layer} down {table.down_hash}".encode())
    return digest.hexdigest()


def make_expert_plan(spec: ModelSpec, moe: Moe, upcycle: Upcycle) -> ExpertPlan:
    """Create the plan of a configuration, for a dense model of this shape.

    If the plan needs weights or text, it has no tables yet.
    """
    return ExpertPlan(make_recipe(spec, moe, upcycle))


def _merge(table: LayerTable) -> Merge | None:
    if table.into_O is None:
        return None
    assert table.weight_O is not None
    assert table.order_OM is not None
    return Merge(table.into_O, table.weight_O, table.order_OM)


def _router_rows(recipe: Recipe, layer: int, table: LayerTable) -> NDArray[np.float32] | None:
    if recipe.source_experts:
        return None
    return router_rows(recipe, layer) if table.router_ED is None else table.router_ED


def _partition(recipe: Recipe, layer: int, table: LayerTable) -> Partition:
    row = METHODS[recipe.method]
    if row.of_moe and recipe.choose != "even":
        assert table.expert_E is not None, f"layer {layer} was not measured"
        return reuse.of_experts(recipe, table.expert_E)
    if row.needs == "nothing":
        return partition(recipe, layer, [Evidence()] * ffns_of_layer(recipe))
    assert table.neurons_EM is not None, f"layer {layer} of {recipe.method} has no table"
    none = np.zeros(0, dtype=np.int64)
    shared_S = none if table.shared_S is None else table.shared_S
    return Partition(table.neurons_EM, shared_S, table.expert_E)


def _reinit_masks(recipe: Recipe, layer: int) -> NDArray[np.bool_]:
    """Choose the neurons to reinitialize, the same for gate, up and down (arXiv 2502.19261)."""
    size, experts = recipe.expert_ffn_hidden_size, range(recipe.num_experts)
    return np.stack([_reinit_mask(recipe, layer, expert, size) for expert in experts])


def _shared_mask(recipe: Recipe, layer: int) -> NDArray[np.bool_] | None:
    """Choose the shared expert's neurons to reinitialize, if it is made of pieces as all others."""
    if not recipe.reinit_ratio or not recipe.shared_size:
        return None
    if METHODS[recipe.method].experts != "pieces":
        return None
    return _reinit_mask(recipe, layer, recipe.num_experts, recipe.shared_size)


def _reinit_mask(recipe: Recipe, layer: int, expert: int, size: int) -> NDArray[np.bool_]:
    """Choose the neurons of one expert; the shared expert counts as the last."""
    mask_M = np.zeros(size, dtype=np.bool_)
    rng = generator(recipe.seed, layer, Use.REINIT_MASK, expert)
    mask_M[rng.permutation(size)[: round(recipe.reinit_ratio * size)]] = True
    return mask_M
