"""Compute the table of one layer from its measurements: neurons, router rows, output scale.

Shape letters: T sampled inputs, D hidden_size, F dense neurons, M neurons of an expert, E experts,
C clusters (= E), K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.config.moe import Moe
from megatron_moe.construct.complete import weights
from megatron_moe.construct.dense_ffn import DenseFfn, combine_weights, router_of
from megatron_moe.construct.routed import routed_neurons
from megatron_moe.experts import split
from megatron_moe.experts.balanced import balanced_kmeans
from megatron_moe.experts.draws import Use, generator
from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan, LayerPlan, LayerTable
from megatron_moe.experts.recipe import Recipe
from megatron_moe.hf.names import ffn_names
from megatron_moe.hf.reader import SourceCheckpoint


@dataclass(frozen=True, slots=True)
class LayerMeasurements:
    """Measurements of one layer, summed over all ranks."""

    inputs_TD: Tensor
    importance_CF: NDArray[np.float64]
    activity_CF: NDArray[np.float64]


def layer_table(
    plan: ExpertPlan, layer: int, measured: LayerMeasurements, dense: SourceCheckpoint, moe: Moe
) -> LayerTable:
    """Compute everything about one layer that cannot be derived from its recipe."""
    recipe = plan.recipe
    table = _partition(recipe, layer, measured, dense)
    if METHODS[recipe.method].routed:
        ffn = DenseFfn.read(dense, layer)
        neurons_EM = routed_neurons(
            ffn, plan.with_tables({layer: table}).layer(layer), measured.inputs_TD,
            topk=moe.moe_router_topk, max_load=recipe.max_load,
        )  # fmt: skip
        table = replace(table, neurons_EM=neurons_EM)
    if recipe.router_init == "centroids":
        table = replace(table, router_ED=centroid_rows(recipe, layer, measured.inputs_TD))
    if recipe.calibrated:
        uncalibrated = replace(plan, recipe=replace(recipe, calibrated=False))
        layer_plan = uncalibrated.with_tables({layer: table}).layer(layer)
        scale = matching_scale(DenseFfn.read(dense, layer), layer_plan, measured.inputs_TD, moe)
        table = replace(table, output_scale=scale)
    return table


def _partition(
    recipe: Recipe, layer: int, measured: LayerMeasurements, dense: SourceCheckpoint
) -> LayerTable:
    row = METHODS[recipe.method]
    if row.needs == "nothing":
        return LayerTable()
    evidence = Evidence(
        up_FD=weights(dense, ffn_names(layer)[1]) if row.needs == "weights" else None,
        importance_CF=measured.importance_CF,
        activity_CF=measured.activity_CF,
        contribution_HF=_contributions(measured, dense, layer) if not row.by_cluster else None,
    )
    part = row.partition(recipe, layer, evidence)
    return LayerTable(neurons_EM=part.neurons_EM, shared_S=part.shared_S)


def _contributions(
    measured: LayerMeasurements, dense: SourceCheckpoint, layer: int
) -> NDArray[np.float32]:
    """Return the norm of each neuron's contribution for each sampled input, ``(H, F)``."""
    ffn = DenseFfn.read(dense, layer)
    act_HF = ffn.activations(measured.inputs_TD)
    return (act_HF.abs_() * ffn.down_DF.norm(dim=0)).numpy()


def centroid_rows(recipe: Recipe, layer: int, inputs_TD: Tensor) -> NDArray[np.float32]:
    """Return centroids of the layer's inputs, with the norm of random rows of router_init_std.

    The mean of all inputs is subtracted first: it would raise the logits of all experts equally.
    """
    points_TD = inputs_TD[: len(inputs_TD) // recipe.num_experts * recipe.num_experts].numpy()
    points_TD = (points_TD - points_TD.mean(axis=0)).astype(np.float32)
    rng = generator(recipe.seed, layer, Use.CLUSTERS, 2)
    cluster_T = balanced_kmeans(points_TD, recipe.num_experts, rng)
    means = [points_TD[cluster_T == expert].mean(axis=0) for expert in range(recipe.num_experts)]
    norm = recipe.router_init_std * recipe.hidden_size**0.5
    return (split.unit_rows(np.stack(means)) * norm).astype(np.float32)


def matching_scale(ffn: DenseFfn, plan: LayerPlan, inputs_TD: Tensor, moe: Moe) -> float:
    """Return the factor of the routed output that gives the MoE layer the dense layer's variance.

    The shared expert's output is subtracted from both sides, so that the factor applies to the
    routed experts alone. It ignores reinitialized neurons and noise: it is computed from the
    experts as they were split.
    """
    shared = torch.from_numpy(plan.shared_S)
    target_TD = ffn.output(inputs_TD) - ffn.output(inputs_TD, shared)
    routed_TD = routed_output(ffn, plan, inputs_TD, moe)
    target, routed = (x.var(dim=0, correction=0).sum() for x in (target_TD, routed_TD))
    return float((target / routed).sqrt())


def routed_output(ffn: DenseFfn, plan: LayerPlan, inputs_TD: Tensor, moe: Moe) -> Tensor:
    """Return the weighted output of the routed experts, before any scale."""
    weights_TE = combine_weights(inputs_TD @ router_of(ffn, plan).T, moe)
    out_TD = torch.zeros(len(inputs_TD), ffn.down_DF.shape[0])
    for expert, neurons_M in enumerate(plan.neurons_EM):
        rows = weights_TE[:, expert].nonzero()[:, 0]
        part = ffn.output(inputs_TD[rows], torch.from_numpy(neurons_M.copy()))
        out_TD.index_add_(0, rows, weights_TE[rows, expert, None] * part)
    return out_TD
