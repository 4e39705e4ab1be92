"""Split the dense neurons into experts, each neuron into one (LLaMA-MoE, arXiv 2406.16554).

Shape letters: E num_moe_experts, F dense neurons, M neurons of one expert, S shared neurons.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.balanced import balanced_kmeans
from megatron_moe.experts.draws import Use, generator
from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe


def random(recipe: Recipe, layer: int, _: Evidence) -> Partition:
    """Split at random (Independent-Random); a shared expert also gets random neurons."""
    rng = generator(recipe.seed, layer, Use.NEURONS)
    order_F = rng.permutation(recipe.dense_ffn_hidden_size)
    shared_S, rest = np.split(order_F, [recipe.shared_size])
    neurons_EM = rest.reshape(recipe.num_experts, recipe.expert_ffn_hidden_size)
    return Partition(np.sort(neurons_EM, axis=1), np.sort(shared_S))


def clustered(recipe: Recipe, layer: int, evidence: Evidence) -> Partition:
    """Cluster neurons by the direction of their rows of ``up`` (Independent-Clustering).

    A shared expert gets the neurons nearest to the mean direction of all, which are the least
    specific to any cluster.
    """
    assert evidence.up_FD is not None
    up_FD = unit_rows(evidence.up_FD)
    near_F = np.round(up_FD @ up_FD.mean(axis=0, dtype=np.float64), 9)
    order_F = np.argsort(-near_F, kind="stable")
    shared_S, rest = np.sort(order_F[: recipe.shared_size]), np.sort(order_F[recipe.shared_size :])
    return Partition(cluster_neurons(recipe, layer, up_FD[rest], rest), shared_S)


def cluster_neurons(
    recipe: Recipe, layer: int, features_XD: NDArray[np.float32], neurons_X: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Group neurons into balanced clusters by their features, ``(E, M)``, ascending in each."""
    cluster_X = balanced_kmeans(
        features_XD, recipe.num_experts, generator(recipe.seed, layer, Use.CLUSTERS)
    )
    order_X = np.argsort(cluster_X, kind="stable")
    return neurons_X[order_X].reshape(recipe.num_experts, recipe.expert_ffn_hidden_size)


def unit_rows(rows_FD: NDArray[np.floating]) -> NDArray[np.float32]:
    """Divide each row by its norm; rows of zeros are unchanged."""
    length_F = np.linalg.norm(rows_FD, axis=1, keepdims=True)
    return (rows_FD / np.maximum(length_F, np.finfo(np.float32).tiny)).astype(np.float32)
