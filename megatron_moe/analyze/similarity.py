"""How alike the experts of a layer are, and how like the dense neurons that they were made of.

Weights come out of the checkpoint expert by expert, without a model. An expert is the sum of its
neurons, whose order means nothing, so experts are compared neuron by neuron of the dense layer:
each of an expert's neurons lies where the dense neuron lies that it is a copy of. Parts of one
layer have nothing in common and a cosine of 0; copies have 1, in whatever order they keep neurons.

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
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.names import ROW_OF_ROLE
from megatron_moe.hf.reader import DenseCheckpoint

BLOCK_NUMBERS = 2**23
"""Numbers of a layer that are looked at together, in float64."""
SMALLEST = 1e-150
"""Norm below which a cosine is 0: of an expert whose weights are all zero."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosines of one layer."""

    between_EE: Tensor
    """Of each two experts' weights: gate, up and down together."""
    to_dense_E: Tensor | None
    """Of an expert and the dense neurons it was made of, scaled as the plan scales them; None where
    the dense weights are not at hand."""


def layer_similarity(
    tensors: GlobalTensors,
    plan: ExpertPlan,
    layer: int,
    dense: Sequence[DenseCheckpoint] | None,
) -> Similarity:
    """Compare the experts of layer ``layer`` of a checkpoint.

    Args:
        tensors: The checkpoint.
        plan: Says which dense neuron each neuron came from.
        layer: Counted from 0 over the whole model.
        dense: The checkpoints that the plan's experts come from, in its order.
    """
    experts = plan.recipe.num_experts
    neurons_EM = torch.tensor(plan.layer(layer).neurons_EM)
    between_EE = torch.zeros(experts, experts, dtype=torch.float64)
    sums_3E = torch.zeros(3, experts, dtype=torch.float64)
    for index, weights in _matrices(tensors, layer, experts):
        between_EE += inner_products(weights, neurons_EM, plan.recipe.dense_ffn_hidden_size)
        for expert, weight_MD in enumerate(weights):
            if dense is not None:
                origin_MD = _origin(dense, plan, layer, expert, index)
                sums_3E[0, expert] += _inner(weight_MD, origin_MD)
                sums_3E[1, expert] += _inner(weight_MD, weight_MD)
                sums_3E[2, expert] += _inner(origin_MD, origin_MD)
    norm_E = between_EE.diagonal().sqrt().clamp_min(SMALLEST)
    return Similarity(
        between_EE=between_EE / (norm_E[:, None] * norm_E),
        to_dense_E=None if dense is None else _cosines(*sums_3E),
    )


def _cosines(inner_E: Tensor, square_E: Tensor, origin_square_E: Tensor) -> Tensor:
    return inner_E / (square_E * origin_square_E).sqrt().clamp_min(SMALLEST)


def inner_products(weights: Sequence[Tensor], neurons_EM: Tensor, size: int) -> Tensor:
    """Inner product of each two experts laid over the dense layer, ``(E, E)`` in float64.

    Args:
        weights: Of each expert a row a neuron, ``(M, D)``.
        neurons_EM: Dense neuron of each row; where an expert has one twice, its rows are added.
        size: Neurons of the dense layer.
    """
    experts, width = len(weights), weights[0].shape[1]
    total_EE = torch.zeros(experts, experts, dtype=torch.float64)
    step = max(1, BLOCK_NUMBERS // (experts * width))
    for start in range(0, size, step):
        block_EFD = torch.zeros(experts, min(step, size - start), width, dtype=torch.float64)
        for expert, weight_MD in enumerate(weights):
            place_M = neurons_EM[expert] - start
            here_M = (place_M >= 0) & (place_M < block_EFD.shape[1])
            block_EFD[expert].index_add_(0, place_M[here_M], weight_MD[here_M].double())
        flat = block_EFD.flatten(1)
        total_EE += flat @ flat.T
    return total_EE


def _matrices(
    tensors: GlobalTensors, layer: int, experts: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Gate, up and down (0, 1, 2) of all experts, each a row a neuron; one of them in memory."""
    for role, parts in (("expert_fc1", (0, 1)), ("expert_fc2", (2,))):
        key = checkpoint_key(ROW_OF_ROLE[role], layer=layer, moe_layer=True)
        _, dtype = tensors.shape_and_dtype(key)
        for part in parts:
            weights = []
            for expert in range(experts):
                whole = tensors.read(key, index=expert, dtype=dtype)
                weights.append(whole.T if part == 2 else whole.chunk(2)[part].clone())
            yield part, weights


def _origin(
    dense: Sequence[DenseCheckpoint], plan: ExpertPlan, layer: int, expert: int, part: int
) -> Tensor:
    """The dense neurons of an expert in the order it keeps them, scaled: ``(M, D)``."""
    built = plan.layer(layer)
    source, neurons_M = dense[int(built.source_E[expert])], built.neurons_EM[expert].copy()
    name = f"model.layers.{layer}.mlp.{('gate', 'up', 'down')[part]}_proj.weight"
    if part == 2:
        values_MD = source.read(name, columns=neurons_M).T
    else:
        values_MD = source.read(name, rows=neurons_M)
    return values_MD.float() * built.weight_scales[part]


def _inner(a_MD: Tensor, b_MD: Tensor) -> float:
    """Inner product in float64, some rows at a time."""
    step = max(1, BLOCK_NUMBERS // a_MD.shape[1])
    return sum(
        float((a.double() * b.double()).sum())
        for a, b in zip(a_MD.split(step), b_MD.split(step), strict=True)
    )
