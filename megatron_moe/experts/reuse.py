"""Build experts from the experts of a MoE model: keep, grow, prune.

Copies of an expert get consecutive ids. Shards over ep then hold the same source experts as before,
and a rank reads each of them once.

Shape letters: E num_moe_experts, O experts of the source, M neurons of one expert.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe


def keep(recipe: Recipe, layer: int, _: Evidence) -> Partition:
    """Take each expert once."""
    return of_experts(recipe, np.arange(recipe.num_experts))


def grow(recipe: Recipe, layer: int, evidence: Evidence) -> Partition:
    """Take each expert at least once, and some several times (arXiv 2604.19835)."""
    if recipe.choose == "even":
        copies = recipe.num_experts // recipe.source_experts
        return of_experts(recipe, np.repeat(np.arange(recipe.source_experts), copies))
    assert evidence.score_O is not None
    return of_experts(recipe, by_score(evidence.score_O, recipe.num_experts))


def prune(recipe: Recipe, layer: int, evidence: Evidence) -> Partition:
    """Take the experts of the highest scores (REAP, arXiv 2510.13999), or at equal distances."""
    if recipe.choose == "even":
        step = recipe.source_experts // recipe.num_experts
        return of_experts(recipe, np.arange(recipe.num_experts) * step)
    assert evidence.score_O is not None
    order_O = np.argsort(-evidence.score_O, kind="stable")
    return of_experts(recipe, np.sort(order_O[: recipe.num_experts]))


def by_score(score_O: NDArray[np.float64], experts: int) -> NDArray[np.int64]:
    """Return the source of each of ``experts`` copies, ascending: ``(E,)``.

    Each source gets one copy. Each further copy goes to the source whose score per copy is the
    highest, which is D'Hondt's method; ties go to the lowest id.

    >>> by_score(np.array([6.0, 1.0, 2.0]), 6)
    array([0, 0, 0, 0, 1, 2])
    """
    copies_O = np.ones(len(score_O), dtype=np.int64)
    for _ in range(experts - len(score_O)):
        copies_O[np.argmax(score_O / copies_O)] += 1
    return np.repeat(np.arange(len(score_O)), copies_O)


def copy_index(expert_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many earlier experts have the same source, ``(E,)``.

    >>> copy_index(np.array([0, 0, 1, 2, 2]))
    array([0, 1, 0, 0, 1])
    """
    first_E = np.searchsorted(expert_E, expert_E)
    return np.arange(len(expert_E)) - first_E


def of_experts(recipe: Recipe, expert_E: NDArray[np.int64]) -> Partition:
    """Return the partition in which each expert is a whole expert of the source."""
    size = recipe.expert_ffn_hidden_size
    neurons_EM = np.broadcast_to(np.arange(size), (recipe.num_experts, size))
    return Partition(neurons_EM, np.arange(recipe.shared_size), expert_E)
