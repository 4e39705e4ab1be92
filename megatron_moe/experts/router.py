"""Initial rows of the router.

Shape letters: E num_moe_experts, D hidden_size, G granularity, R replicas = E / G.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.draws import Use, generator
from megatron_moe.experts.recipe import Recipe
from megatron_moe.experts.reuse import copy_index

TIE_BREAK_STD = 1e-6
"""Standard deviation of near-zero rows. Zero rows would send every token to the first K experts;
these break ties without giving any expert a larger weight."""


def router_rows(recipe: Recipe, layer: int) -> NDArray[np.float32] | None:
    """Draw random rows, ``(E, D)``; return None if rows are measured or taken from the weights."""
    experts, std = recipe.num_experts, np.float32(recipe.router_init_std)
    match recipe.router_init:
        case "normal":
            return _normal(recipe, layer, experts) * std
        case "uniform":
            drawn = generator(recipe.seed, layer).random(
                (experts, recipe.hidden_size), dtype=np.float32
            )
            return (2 * drawn - 1) * np.float32(3**0.5) * std
        case "zero":
            return _normal(recipe, layer, experts) * np.float32(TIE_BREAK_STD)
        case "virtual_groups":
            granularity = recipe.dense_ffn_hidden_size // recipe.expert_ffn_hidden_size
            rows_RD = _normal(recipe, layer, experts // granularity) * std
            return np.repeat(rows_RD, granularity, axis=0)
        case "gate_mean" | "centroids":
            return None


def twin_rows(
    recipe: Recipe, layer: int, expert_E: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """Return what is added to router rows of copies of the experts of a MoE; None if nothing.

    With ``noise``, every copy but the first gets random rows of its own. With ``bias``, all first
    copies get the same row, all second copies another, and so on. A softmax over the chosen experts
    does not change if all of them are copies of the same number.
    """
    copy_E = copy_index(expert_E)
    if recipe.twins not in ("noise", "bias"):
        return None
    rows = len(expert_E) if recipe.twins == "noise" else int(copy_E.max()) + 1
    drawn_RD = generator(recipe.seed, layer, Use.TWINS).standard_normal(
        (rows, recipe.hidden_size), dtype=np.float32
    ) * np.float32(recipe.router_init_std)
    if recipe.twins == "bias":
        return drawn_RD[copy_E]
    return drawn_RD * (copy_E > 0).astype(np.float32)[:, None]


def _normal(recipe: Recipe, layer: int, rows: int) -> NDArray[np.float32]:
    shape = (rows, recipe.hidden_size)
    return generator(recipe.seed, layer).standard_normal(shape, dtype=np.float32)
