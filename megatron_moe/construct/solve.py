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

from megatron_moe.config.run import Moe
from megatron_moe.construct.complete import up_weights
from megatron_moe.experts import split
from megatron_moe.experts.balanced import balanced_kmeans
from megatron_moe.experts.draws import Use, generator
from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan, LayerPlan, LayerTable
from megatron_moe.experts.recipe import Recipe
from megatron_moe.hf.names import ffn_names
from megatron_moe.hf.reader import DenseCheckpoint


@dataclass(frozen=True, slots=True)
class LayerMeasurements:
    """Measurements of one layer, summed over all ranks."""

    inputs_TD: Tensor
    importance_CF: NDArray[np.float64]
    activity_CF: NDArray[np.float64]


def layer_table(
    plan: ExpertPlan, layer: int, measured: LayerMeasurements, dense: DenseCheckpoint, moe: Moe
) -> LayerTable:
    """Compute everything about one layer that cannot be derived from its recipe."""
    recipe = plan.recipe
    table = _partition(recipe, layer, measured, dense)
    if recipe.router_init == "centroids":
        table = replace(table, router_ED=centroid_rows(recipe, layer, measured.inputs_TD))
    if recipe.calibrated:
        uncalibrated = replace(plan, recipe=replace(recipe, calibrated=False))
        layer_plan = uncalibrated.with_tables({layer: table}).layer(layer)
        gate, up, down = (dense.read(name).float() for name in ffn_names(layer))
        ffn = DenseFfn(gate, up, down)
        scale = matching_scale(ffn, layer_plan, measured.inputs_TD, moe)
        table = replace(table, output_scale=scale)
    return table


def _partition(
    recipe: Recipe, layer: int, measured: LayerMeasurements, dense: DenseCheckpoint
) -> LayerTable:
    row = METHODS[recipe.method]
    if row.needs == "nothing":
        return LayerTable()
    evidence = Evidence(
        up_FD=up_weights(dense, layer) if row.needs == "weights" else None,
        importance_CF=measured.importance_CF,
        activity_CF=measured.activity_CF,
    )
    part = row.partition(recipe, layer, evidence)
    return LayerTable(neurons_EM=part.neurons_EM, shared_S=part.shared_S)


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


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """Full weights of a dense FFN."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    def output(self, x_TD: Tensor, neurons_M: Tensor | slice = slice(None)) -> Tensor:
        """Return the contribution of these neurons to the residual stream."""
        gate_TM, up_TM = x_TD @ self.gate_FD[neurons_M].T, x_TD @ self.up_FD[neurons_M].T
        return (torch.nn.functional.silu(gate_TM) * up_TM) @ self.down_DF[:, neurons_M].T


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
    weights_TE = combine_weights(inputs_TD @ _router(ffn, plan).T, moe)
    out_TD = torch.zeros(len(inputs_TD), ffn.down_DF.shape[0])
    for expert, neurons_M in enumerate(plan.neurons_EM):
        rows = weights_TE[:, expert].nonzero()[:, 0]
        part = ffn.output(inputs_TD[rows], torch.from_numpy(neurons_M.copy()))
        out_TD.index_add_(0, rows, weights_TE[rows, expert, None] * part)
    return out_TD


def combine_weights(logits_TE: Tensor, moe: Moe) -> Tensor:
    """Return the weight of each expert for each token, zero if it is not chosen."""
    scores_TE = logits_TE
    if moe.moe_router_score_function == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    elif moe.router_order == "softmax_topk":
        scores_TE = logits_TE.softmax(dim=-1)
    values_TK, chosen_TK = scores_TE.topk(moe.moe_router_topk, dim=-1)
    if moe.moe_router_score_function == "sigmoid":
        values_TK = values_TK / values_TK.sum(dim=-1, keepdim=True)
    elif moe.router_order == "topk_softmax":
        values_TK = values_TK.softmax(dim=-1)
    return torch.zeros_like(logits_TE).scatter(-1, chosen_TK, values_TK)


def _router(ffn: DenseFfn, plan: LayerPlan) -> Tensor:
    if plan.router_ED is not None:
        return torch.from_numpy(plan.router_ED)
    rows = [ffn.gate_FD[torch.from_numpy(n.copy())].mean(dim=0) for n in plan.neurons_EM]
    return torch.stack(rows)
