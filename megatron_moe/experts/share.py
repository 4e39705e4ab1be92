"""Choose experts by the activity of neurons on real text: sharing_inner, sharing_inter, weaver.

Neurons that are important for several experts go either to several experts (inner) or to a shared
expert (inter, weaver). `megatron-moe construct` measures; this module only evaluates its results.

Shape letters: E num_moe_experts, F dense neurons, M neurons of one expert, S shared neurons,
C clusters of the text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.recipe import Recipe
from megatron_moe.experts.split import Partition, cluster_neurons, unit_rows

Numbers = NDArray[np.floating]


def sharing_inner(importance_EF: Numbers, *, size: int) -> Partition:
    """Give each expert the ``size`` most important neurons for its part of the text.

    Args:
        importance_EF: Importance of each neuron for the data of each expert's cluster.
        size: M.
    """
    return Partition(np.sort(_top(importance_EF, size), axis=1), np.zeros(0, dtype=np.int64))


def sharing_inter(importance_EF: Numbers, *, size: int, shared: int) -> Partition:
    """Share the neurons that most experts select; give each expert the best of the rest.

    An expert selects the ``size`` neurons that sharing_inner would give it. Ties between neurons
    selected by equally many experts are broken by the larger total importance.
    """
    selected_EF = np.zeros(importance_EF.shape, dtype=np.int64)
    np.put_along_axis(selected_EF, _top(importance_EF, size), 1, axis=1)
    order_F = np.lexsort((-importance_EF.sum(axis=0), -selected_EF.sum(axis=0)))
    shared_S = np.sort(order_F[:shared])
    left_EF = importance_EF.astype(np.float64)
    left_EF[:, shared_S] = -np.inf
    return Partition(np.sort(_top(left_EF, size), axis=1), shared_S)


def weaver(recipe: Recipe, layer: int, activity_CF: Numbers) -> Partition:
    """Share the neurons whose activity varies least over kinds of text, and cluster the rest.

    Args:
        recipe: Sizes and seed.
        layer: Global layer id.
        activity_CF: Mean magnitude of each neuron's activation on each cluster of the text. The
            spread over clusters relative to the mean (coefficient of variation) measures how
            specialized a neuron is (ExpertWeaver, arXiv 2602.15521).
    """
    mean_F = activity_CF.mean(axis=0)
    variation_F = activity_CF.std(axis=0) / np.maximum(mean_F, np.finfo(np.float32).tiny)
    order_F = np.argsort(variation_F, kind="stable")
    rest = np.sort(order_F[recipe.shared_size :])
    profiles_XC = unit_rows(activity_CF[:, rest].T.astype(np.float32))
    neurons_EM = cluster_neurons(recipe, layer, profiles_XC, rest)
    return Partition(neurons_EM, np.sort(order_F[: recipe.shared_size]))


def _top(importance_EF: Numbers, count: int) -> NDArray[np.int64]:
    """Return the indices of the ``count`` largest of each row; ties go to the lower index."""
    return np.argsort(-importance_EF, axis=1, kind="stable")[:, :count]
