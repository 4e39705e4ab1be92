"""Count what `megatron-moe construct` computes: measuring, fitting and solving, and its memory.

The passes are those of `construct/measure.py` and `construct/fit.py`. Products run in fp32 on all
ranks; systems are solved in fp64 on one. Norms, logits of routers and clusters are not counted.

Shape letters: T calibration tokens, D hidden_size, F dense neurons, E experts, M neurons of an
expert, N neurons of a MoE layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.moe import Measure
from megatron_moe.experts.methods import METHODS, measures
from megatron_moe.experts.recipe import HELD_OUT_EVERY, PENALTIES, ROUTING_TURNS, Recipe
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.flops import ForwardFlops, forward_flops
from megatron_moe.planner.shape import source_shape

UTILIZATION = 0.55
"""Part of the speed of large products that construction reaches: measured on 2 CPU cores with
SmolLM2-135M (docs/recovery.md), not on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstructionCost:
    """Work and memory of a construction."""

    layers: int
    """MoE layers."""
    measuring: float
    """Operations in fp32 of measuring the source on text, on all ranks together."""
    fitting: float
    """Operations in fp32 of a fit, on all ranks together."""
    solving: float
    """Operations in fp64 of a fit, on one rank."""
    rank_bytes: int
    """Memory of one rank for hidden states, sums and weights of a layer during a fit."""
    disk_bytes: int
    """Files of solved matrices, and of one measurement in progress."""

    def hours(self, *, fp32: float, fp64: float, ranks: int) -> float:
        """Return the time at these speeds of one rank, in operations per second."""
        seconds = (self.measuring + self.fitting) / (fp32 * ranks) + self.solving / fp64
        return seconds / UTILIZATION / 3600


def construction_cost(
    recipe: Recipe, spec: ModelSpec, measure: Measure, *, seq_length: int, ranks: int
) -> ConstructionCost:
    """Count the work of constructing ``recipe`` on ``measure.samples`` sequences."""
    samples = measure.samples
    tokens, layers = samples * seq_length, len(recipe.moe_layers)
    forward = forward_flops(
        source_shape(spec), sequence_length=seq_length, batch_size=samples, causal=True
    )
    neurons = recipe.num_experts * recipe.expert_ffn_hidden_size + recipe.shared_size
    measuring = 0
    if measures(recipe) == "text":
        by_cluster = METHODS[recipe.method].by_cluster  # a second pass, forward and backward
        kept = layers * min(measure.hidden_states, tokens)
        activations = 0 if by_cluster else 4 * spec.hidden_size * spec.ffn_hidden_size
        measuring = forward.model * (4 if by_cluster else 1) + kept * activations
        if METHODS[recipe.method].routed:
            measuring += layers * _routing(recipe, spec, tokens=kept // layers)
    hidden = spec.hidden_size
    states = (2 if recipe.fit_stream else 1) * -(-samples // ranks) * seq_length * hidden
    fits = bool(recipe.fit)
    # In fp64: Gram matrix, system and factor; products, right side and solution. In fp32: the dense
    # weights, sliced rows, and a solution for each penalty.
    single = 4 * (3 + 1 + len(PENALTIES))
    solution = 24 * neurons * (neurons + hidden) + single * neurons * hidden
    return ConstructionCost(
        layers=layers,
        measuring=measuring,
        fitting=_fitting(recipe, spec, forward, tokens, neurons) if fits else 0,
        solving=layers * _solving(recipe, neurons, hidden),
        rank_bytes=fits * (4 * states + solution),
        disk_bytes=4 * layers * neurons * hidden * ("down" in recipe.fit),
    )


def _routing(recipe: Recipe, spec: ModelSpec, *, tokens: int) -> float:
    """Return the operations of the turns in which neurons of a layer change experts."""
    hidden, dense, size = spec.hidden_size, spec.ffn_hidden_size, recipe.expert_ffn_hidden_size
    routed, experts = recipe.num_experts * size, recipe.num_experts
    target = 2 * tokens * hidden * (3 * dense + recipe.shared_size)
    grams = 2 * hidden * routed * size
    per_token = 2 * hidden * dense + 2 * routed * (size + experts) + 2 * hidden**2
    per_token += 2 * hidden * 2 * (experts + 1)
    return target + ROUTING_TURNS * (grams + tokens * per_token)


def _fitting(
    recipe: Recipe, spec: ModelSpec, forward: ForwardFlops, tokens: int, neurons: int
) -> float:
    """Return the operations of all passes of a fit over the text."""
    hidden, dense = spec.hidden_size, spec.ffn_hidden_size
    product, out = 2 * hidden * dense, 2 * hidden * neurons
    per_token = 2 * product + out  # of the finished layer
    if "router" in recipe.fit:  # activations, target, and gains
        per_token += 4 * product + 2 * neurons * recipe.expert_ffn_hidden_size + 2 * hidden**2
    if "down" in recipe.fit:  # activations, target, sums
        per_token += 3 * product + 2 * neurons**2 + out
    per_token += (3 * product + (len(PENALTIES) + 1) * out) / HELD_OUT_EVERY
    attention = forward.attention_projections + forward.attention_scores
    return attention + len(recipe.moe_layers) * tokens * per_token


def _solving(recipe: Recipe, neurons: int, hidden: int) -> float:
    """Return the operations of the Cholesky factors and solutions of one layer."""
    router = hidden**3 / 3 + 2 * hidden**2 * (recipe.num_experts + 1)
    down = (len(PENALTIES) + 1) * (neurons**3 / 3 + 2 * neurons**2 * hidden)
    return router * ("router" in recipe.fit) + down * ("down" in recipe.fit)
