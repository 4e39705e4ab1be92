"""Split each expert of a MoE source into G finer ones, by a method that splits a dense FFN.

An expert is a SwiGLU FFN like a dense one, so its output is the sum of those of its parts. Parts of
an expert have consecutive ids and equal router rows, so a top-k of G K chooses all parts of the K
experts that the source chooses. The combine weights are then divided by G, because the logits of G
equal rows share what one had; the factor G on ``down`` restores the sum.

Shape letters: E num_moe_experts, G parts of an expert, M neurons of one part, O experts of the
source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_moe.experts.partition import Evidence, Partition
from megatron_moe.experts.recipe import Recipe

Split = Callable[[Recipe, int, Evidence], Partition]


def parts_of_experts(
    split: Split, recipe: Recipe, layer: int, evidence_O: Sequence[Evidence]
) -> Partition:
    """Apply ``split`` to each source expert of a layer; the shared expert stays as it is.

    Args:
        split: Function of a row of `methods.METHODS`.
        recipe: Recipe of the run; its dense FFN is an expert of the source.
        layer: Global layer id.
        evidence_O: Evidence about each source expert.
    """
    experts = recipe.source_experts
    one = replace(recipe, num_experts=recipe.num_experts // experts, shared_size=0)
    # The layer id is a key of the random numbers, which must differ from expert to expert.
    neurons = [split(one, layer * experts + o, evidence_O[o]).neurons_EM for o in range(experts)]
    return Partition(
        np.concatenate(neurons),
        np.arange(recipe.shared_size),
        np.repeat(np.arange(experts), one.num_experts),
    )
