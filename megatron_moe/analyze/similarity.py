"""Compute the similarity of a layer's experts to each other and to their source neurons.

Weights are read from the checkpoint one expert at a time, without a model. The order of an expert's
neurons has no meaning, so each neuron is placed at the position of the dense neuron that it was
copied from before experts are compared. Disjoint parts of one layer have a cosine of 0; copies have
a cosine of 1, whatever the order of their neurons. Neurons of different experts of a MoE source are
compared by position, which gives a cosine near 0.

Shape letters of this module:

    E  num_moe_experts   F  neurons of the dense layer   M  neurons of one expert   D  hidden_size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.checkpoint.merged import read_merged
from megatron_moe.config.train import Lora
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.names import ROW_OF_ROLE, expert_names, ffn_names
from megatron_moe.hf.reader import SourceCheckpoint

BLOCK_NUMBERS = 2**23
"""Number of a layer's weights that are converted to float64 at a time."""
MIN_NORM = 1e-150
"""Lower bound of norms, so that the cosine of an all-zero expert is 0."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosine similarities of the experts of one layer."""

    between_EE: Tensor
    """Cosine of each pair of experts, over gate, up and down weights together."""
    to_dense_E: Tensor | None
    """Cosine of each expert and its source neurons, scaled as in the plan; None without the dense
    weights."""


def layer_similarity(
    tensors: GlobalTensors,
    plan: ExpertPlan,
    layer: int,
    dense: Sequence[SourceCheckpoint] | None,
    *,
    lora: Lora = Lora(),  # noqa: B008 - frozen
) -> Similarity:
    """Compare the experts of layer ``layer`` of a checkpoint.

    Args:
        tensors: The checkpoint.
        plan: Maps each expert neuron to its dense neuron.
        layer: Layer id, counted from 0 over the whole model.
        dense: The source checkpoints of the plan's experts, in the plan's order.
        lora: Adapters of the run, which are added to the weights.
    """
    experts = plan.recipe.num_experts
    neurons_EM = torch.tensor(plan.layer(layer).neurons_EM)
    between_EE = torch.zeros(experts, experts, dtype=torch.float64)
    sums_3E = torch.zeros(3, experts, dtype=torch.float64)
    for index, weights in _matrices(tensors, layer, experts, lora):
        between_EE += inner_products(weights, neurons_EM, plan.recipe.dense_ffn_hidden_size)
        for expert, weight_MD in enumerate(weights):
            if dense is not None:
                origin_MD = _origin(dense, plan, layer, expert, index)
                sums_3E[0, expert] += _inner(weight_MD, origin_MD)
                sums_3E[1, expert] += _inner(weight_MD, weight_MD)
                sums_3E[2, expert] += _inner(origin_MD, origin_MD)
    norm_E = between_EE.diagonal().sqrt().clamp_min(MIN_NORM)
    return Similarity(
        between_EE=between_EE / (norm_E[:, None] * norm_E),
        to_dense_E=None if dense is None else _cosines(*sums_3E),
    )


def _cosines(inner_E: Tensor, square_E: Tensor, origin_square_E: Tensor) -> Tensor:
    return inner_E / (square_E * origin_square_E).sqrt().clamp_min(MIN_NORM)


def inner_products(weights: Sequence[Tensor], neurons_EM: Tensor, size: int) -> Tensor:
    """Return the inner product of each pair of aligned experts, ``(E, E)`` in float64.

    Args:
        weights: Weights of each expert, one row per neuron, ``(M, D)``.
        neurons_EM: Dense neuron of each row; rows of an expert with the same neuron are added.
        size: Number of neurons of the dense layer.
    """
    experts, width = len(weights), weights[0].shape[1]
    total_EE = torch.zeros(experts, experts, dtype=torch.float64)
    step = max(1, BLOCK_NUMBERS // (experts * width))
    for start in range(0, size, step):
        block_EFD = torch.zeros(experts, min(step, size - start), width, dtype=torch.float64)
        for expert, weight_MD in enumerate(weights):
            position_M = neurons_EM[expert] - start
            in_block_M = (position_M >= 0) & (position_M < block_EFD.shape[1])
            rows = weight_MD[in_block_M].double()
            block_EFD[expert].index_add_(0, position_M[in_block_M], rows)
        flat = block_EFD.flatten(1)
        total_EE += flat @ flat.T
    return total_EE


def _matrices(
    tensors: GlobalTensors, layer: int, experts: int, lora: Lora
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield gate, up and down (0, 1, 2) of all experts, one row per neuron; one at a time."""
    for role, parts in (("expert_fc1", (0, 1)), ("expert_fc2", (2,))):
        row = ROW_OF_ROLE[role]
        key = checkpoint_key(row, layer=layer, moe_layer=True)
        _, dtype = tensors.shape_and_dtype(key)
        for part in parts:
            weights = []
            for expert in range(experts):
                whole = read_merged(
                    tensors, key, row, lora, layer=layer, expert=expert, dtype=dtype
                )
                weights.append(whole.T if part == 2 else whole.chunk(2)[part].clone())
            yield part, weights


def _origin(
    dense: Sequence[SourceCheckpoint], plan: ExpertPlan, layer: int, expert: int, part: int
) -> Tensor:
    """Return the scaled source neurons of an expert in its own order: ``(M, D)``."""
    built = plan.layer(layer)
    source, neurons_M = dense[int(built.source_E[expert])], built.neurons_EM[expert].copy()
    names = ffn_names(layer)
    if built.expert_E is not None:
        names = expert_names(layer, int(built.expert_E[expert]))
    name = names[part]
    if part == 2:
        values_MD = source.read(name, columns=neurons_M).T
    else:
        values_MD = source.read(name, rows=neurons_M)
    return values_MD.float() * built.weight_scales[part]


def _inner(a_MD: Tensor, b_MD: Tensor) -> float:
    """Return the inner product in float64, computed a few rows at a time."""
    step = max(1, BLOCK_NUMBERS // a_MD.shape[1])
    return sum(
        float((a.double() * b.double()).sum())
        for a, b in zip(a_MD.split(step), b_MD.split(step), strict=True)
    )
