"""Floating-point operations of one sequence, in the two conventions of published figures.

Only matrix products count, with two operations per multiply-add; norms, activations and softmax do
not. The backward pass costs twice the forward pass. The conventions differ in attention scores:

    causal           the triangle that a causal model needs
    full attention   the whole ``S x S`` square, as LLaMA-MoE (arXiv 2406.16554, table 3) and
                     arXiv 2412.09952 (table 1) count, although no causal kernel computes it

The router's product is counted separately, because the papers exclude it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

from megatron_moe.config.parts import ALL_TRAINED, Frozen, Role
from megatron_moe.planner.parameters import attention_adapters, expert_adapters
from megatron_moe.planner.shape import MoeShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFlops:
    """Forward operations by part: exact integers, except for the rounding of a capacity."""

    attention_projections: int
    attention_scores: int
    dense_ffn: int
    experts: int
    shared_experts: int
    output_layer: int
    adapters: int
    router: int
    """Not included in `model`, because papers exclude it."""
    padding: int
    """Operations on rows of zeros that pad experts to their capacity; not included in `model`."""

    @property
    def model(self) -> int:
        """Operations that the model needs: the numerator of MFU."""
        return (
            self.attention_projections
            + self.attention_scores
            + self.dense_ffn
            + self.experts
            + self.shared_experts
            + self.output_layer
            + self.adapters
        )

    @property
    def executed(self) -> int:
        """Operations of all matrix products of the forward pass, including router and padding."""
        return self.model + self.router + self.padding


def forward_flops(
    shape: MoeShape,
    *,
    sequence_length: int,
    batch_size: int = 1,
    causal: bool = False,
    padded_capacity_factor: float | None = None,
) -> ForwardFlops:
    """Count the operations of one forward pass over ``batch_size`` sequences.

    Args:
        shape: The model.
        sequence_length: Tokens of each sequence (S).
        batch_size: Number of sequences (B).
        causal: Count only the lower triangle of the scores, including the diagonal.
        padded_capacity_factor: Each expert computes ``ceil(T * K / E * factor)`` rows regardless
            of how many tokens it receives; None means no padding.
    """
    tokens = sequence_length * batch_size
    d, layers = shape.hidden_size, shape.num_layers
    seen = sequence_length * (sequence_length + 1) // 2 if causal else sequence_length**2
    expert_row = 6 * d * shape.moe_ffn_hidden_size
    rows = tokens * shape.moe_router_topk
    return ForwardFlops(
        attention_projections=layers * tokens * 4 * d * (shape.query_width + shape.kv_width),
        attention_scores=layers * batch_size * 4 * seen * shape.query_width,
        dense_ffn=shape.num_dense_layers * tokens * 6 * d * shape.ffn_hidden_size,
        experts=shape.num_moe_layers * rows * expert_row,
        shared_experts=shape.num_moe_layers * tokens * _shared_expert_flops(shape),
        output_layer=tokens * 2 * d * shape.vocab_size,
        adapters=layers * tokens * 2 * sum(attention_adapters(shape, 1).values())
        + shape.num_moe_layers * rows * 2 * sum(expert_adapters(shape, 1).values()),
        router=shape.num_moe_layers * tokens * 2 * d * shape.num_moe_experts,
        padding=shape.num_moe_layers
        * expert_row
        * _padding_rows(shape, rows, padded_capacity_factor),
    )


@dataclass(frozen=True, slots=True)
class SequenceFlops:
    """Operations of training on one sequence, forward and backward: the numerators of MFU."""

    causal: int
    """Operations that a causal model needs."""
    full_attention: int
    """Operations if the whole square of the attention scores counted."""

    def __add__(self, other: SequenceFlops) -> SequenceFlops:
        return SequenceFlops(self.causal + other.causal, self.full_attention + other.full_attention)


@lru_cache
def sequence_flops(
    shape: MoeShape, sequence_length: int, frozen: Frozen = ALL_TRAINED
) -> SequenceFlops:
    """Count the operations of training on one sequence in both conventions.

    The weight gradients of frozen parts are not computed, so they are left out.
    """
    forward = partial(forward_flops, shape, sequence_length=sequence_length)
    return SequenceFlops(
        causal=step_flops(shape, forward(causal=True), frozen),
        full_attention=step_flops(shape, forward(), frozen),
    )


def step_flops(shape: MoeShape, forward: ForwardFlops, frozen: Frozen) -> int:
    """Return `training_flops` of the model without the weight gradients of frozen parts."""
    weights: dict[Role, int] = {
        "attention": forward.attention_projections,
        "dense_ffn": forward.dense_ffn,
        "experts": forward.experts,
        "shared_experts": forward.shared_experts,
        "adapters": forward.adapters,
    }
    left_out = forward.output_layer * ("embeddings" in frozen)
    for role, flops in weights.items():
        if layers := len(shape.layers_with(role)):
            left_out += flops * (layers - shape.trained_layers(role, frozen)) // layers
    return training_flops(forward.model) - left_out


def training_flops(forward: int) -> int:
    """Return forward plus backward operations.

    Each product has two products in the backward pass, one for each operand.
    """
    return 3 * forward


def _shared_expert_flops(shape: MoeShape) -> int:
    """Return the operations of one token, including the scalar gate if there is one."""
    gate = 2 * shape.hidden_size if shape.shared_expert_gate else 0
    return 6 * shape.hidden_size * shape.shared_expert_size + gate


def _padding_rows(shape: MoeShape, rows: int, factor: float | None) -> int:
    """Return the rows of zeros of one layer, assuming that no token is dropped."""
    if factor is None:
        return 0
    # Megatron-Core's get_capacity (moe_utils.py), called with T * K tokens.
    capacity = -(-rows * factor // shape.num_moe_experts)
    return max(0, int(capacity) * shape.num_moe_experts - rows)
