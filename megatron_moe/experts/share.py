"""Choose experts by the activity of neurons on real text.

Neurons that are important for several experts go either to several experts (inner) or to a shared
expert (inter, weaver). `megatron-moe construct` measures; this module only evaluates its results.

Shape letters: E num_moe_experts, F dense neurons, M neurons of one expert, S shared neurons,
C clusters of the text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe
from megatron_moe.experts.split import cluster_neurons, unit_rows

Numbers = NDArray[np.floating]


def sharing_inner(recipe: Recipe, _: int, evidence: Evidence) -> Partition:
    """Give each expert the M most important neurons for its cluster of the text."""
    assert evidence.importance_CF is not None
    chosen_EM = _top(evidence.importance_CF, recipe.expert_ffn_hidden_size)
    return Partition(np.sort(chosen_EM, axis=1))


def sharing_inter(recipe: Recipe, _: int, evidence: Evidence) -> Partition:
    """Share the neurons that most experts select; give each expert the best of the rest.

    An expert selects the M neurons that sharing_inner would give it. Ties between neurons selected
    by equally many experts are broken by the larger total importance.
    """
    assert evidence.importance_CF is not None
    importance_EF, size = evidence.importance_CF, recipe.expert_ffn_hidden_size
    selected_EF = np.zeros(importance_EF.shape, dtype=np.int64)
    np.put_along_axis(selected_EF, _top(importance_EF, size), 1, axis=1)
    order_F = np.lexsort((-importance_EF.sum(axis=0), -selected_EF.sum(axis=0)))
    shared_S = np.sort(order_F[: recipe.shared_size])
    left_EF = importance_EF.astype(np.float64)
    left_EF[:, shared_S] = -np.inf
    return Partition(np.sort(_top(left_EF, size), axis=1), shared_S)


def weaver(recipe: Recipe, layer: int, evidence: Evidence) -> Partition:
    """Share the neurons whose activity varies least over kinds of text, and cluster the rest.

    The spread of a neuron's activity over clusters of the text relative to the mean (coefficient
    of variation) measures how specialized it is (ExpertWeaver, arXiv 2602.15521).
    """
    assert evidence.activity_CF is not None
    activity_CF = evidence.activity_CF
    mean_F = activity_CF.mean(axis=0)
    variation_F = activity_CF.std(axis=0) / np.maximum(mean_F, np.finfo(np.float32).tiny)
    order_F = np.argsort(variation_F, kind="stable")
    rest = np.sort(order_F[recipe.shared_size :])
    profiles_XC = unit_rows(activity_CF[:, rest].T.astype(np.float32))
    neurons_EM = cluster_neurons(recipe, layer, profiles_XC, rest)
    return Partition(neurons_EM, np.sort(order_F[: recipe.shared_size]))


def coactivation(recipe: Recipe, layer: int, evidence: Evidence) -> Partition:
    """Group the neurons that contribute to the same tokens; share those that most tokens use.

    A neuron's profile is the norm of its contribution for each sampled token. The shared expert
    gets the neurons with the largest mean.
    """
    assert evidence.contribution_HF is not None
    profile_FH = evidence.contribution_HF.T
    order_F = np.argsort(-profile_FH.mean(axis=1), kind="stable")
    shared_S, rest = np.sort(order_F[: recipe.shared_size]), np.sort(order_F[recipe.shared_size :])
    neurons_EM = cluster_neurons(recipe, layer, unit_rows(profile_FH[rest]), rest)
    return Partition(neurons_EM, shared_S)


def _top(importance_EF: Numbers, count: int) -> NDArray[np.int64]:
    """Return the indices of the ``count`` largest of each row; ties go to the lower index."""
    return np.argsort(-importance_EF, axis=1, kind="stable")[:, :count]
