"""Build experts as copies of the dense FFN, whole or in shards: copy, drop, mix, granular, qwen.

Shape letters: E num_moe_experts, F dense neurons, M neurons of one expert.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.draws import Use, generator
from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe


def copy(recipe: Recipe, layer: int, _: Evidence) -> Partition:
    """Give each expert the whole dense FFN (arXiv 2212.05055, section 3; 2412.09952)."""
    shape = (recipe.num_experts, recipe.expert_ffn_hidden_size)
    return Partition(np.broadcast_to(_dense_order(recipe, layer), shape))


def granular(recipe: Recipe, layer: int, _: Evidence) -> Partition:
    """Give expert e shard e mod G of the dense FFN (virtual groups, arXiv 2410.07524)."""
    shards_GM = _dense_order(recipe, layer).reshape(-1, recipe.expert_ffn_hidden_size)
    return Partition(shards_GM[np.arange(recipe.num_experts) % len(shards_GM)])


def qwen(recipe: Recipe, layer: int, _: Evidence) -> Partition:
    """Shuffle as many copies of the FFN as needed and split them into experts (Qwen1.5-MoE).

    The rest of the last copy is discarded. A shared expert gets copies of its own.
    """
    size, experts = recipe.expert_ffn_hidden_size, recipe.num_experts
    routed = _shuffled_copies(recipe, experts * size, layer, Use.NEURONS)
    shared_S = _shuffled_copies(recipe, recipe.shared_size, layer, Use.SHARED_NEURONS)
    return Partition(routed.reshape(experts, size), shared_S)


def _shuffled_copies(recipe: Recipe, neurons: int, layer: int, use: Use) -> NDArray[np.int64]:
    """Return the first ``neurons`` of shuffled copies of the FFN, one copy after the other."""
    shuffled = [
        generator(recipe.seed, layer, use, index).permutation(recipe.dense_ffn_hidden_size)
        for index in range(-(-neurons // recipe.dense_ffn_hidden_size))
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *shuffled])[:neurons]


def source_of_experts(recipe: Recipe) -> NDArray[np.int64]:
    """Return each expert's dense checkpoint, ``(E,)`` (Branch-Train-MiX, arXiv 2403.07816)."""
    return np.arange(recipe.num_experts) % recipe.num_sources


def _dense_order(recipe: Recipe, layer: int) -> NDArray[np.int64]:
    """Return the dense neurons in their order, or in a random order of permutation_seed."""
    if recipe.permutation_seed is None:
        return np.arange(recipe.dense_ffn_hidden_size)
    rng = generator(recipe.permutation_seed, layer, Use.PERMUTATION)
    return rng.permutation(recipe.dense_ffn_hidden_size)
