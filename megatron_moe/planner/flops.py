"""Floating-point operations of one sequence, counted as published figures count them.

Only matrix products count, two operations a multiply-add; norms, activations and softmax do not.
The backward pass is twice the forward pass. Attention scores count the full ``S x S`` square
unless ``causal`` is asked for: LLaMA-MoE (arXiv 2406.16554, table 3), arXiv 2412.09952 (table 1)
and 2504.14960 all do, although a causal kernel computes half of it.

The router's product is counted apart, because the papers leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.planner.shape import MoeShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFlops:
    """Forward operations by part; each is exact and an integer, but for a capacity's rounding."""

    attention_projections: int
    attention_scores: int
    dense_ffn: int
    experts: int
    shared_experts: int
    output_layer: int
    router: int
    """Not in `model`: papers leave it out."""
    padding: int
    """Operations on rows of zeros that fill experts up to their capacity; not in `model`."""

    @property
    def model(self) -> int:
        """What the model needs, the numerator of MFU."""
        return (
            self.attention_projections
            + self.attention_scores
            + self.dense_ffn
            + self.experts
            + self.shared_experts
            + self.output_layer
        )

    @property
    def executed(self) -> int:
        """All matrix products of the forward pass, router and padding too."""
        return self.model + self.router + self.padding


def forward_flops(
    shape: MoeShape,
    *,
    sequence_length: int,
    batch_size: int = 1,
    causal: bool = False,
    padded_capacity_factor: float | None = None,
) -> ForwardFlops:
    """Operations of one forward pass over ``batch_size`` sequences.

    Args:
        shape: The model.
        sequence_length: Tokens of each sequence (S).
        batch_size: Sequences (B).
        causal: Count the lower triangle of the scores with its diagonal instead of the square.
        padded_capacity_factor: Experts compute ``ceil(T * K / E * factor)`` rows each, whatever
            they are sent; None pads nothing.
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
        router=shape.num_moe_layers * tokens * 2 * d * shape.num_moe_experts,
        padding=shape.num_moe_layers
        * expert_row
        * _padding_rows(shape, rows, padded_capacity_factor),
    )


def training_flops(forward: int) -> int:
    """Forward and backward: each product has two in the backward pass, one for each operand."""
    return 3 * forward


def _shared_expert_flops(shape: MoeShape) -> int:
    """Of one token, with the scalar gate where there is one."""
    gate = 2 * shape.hidden_size if shape.shared_expert_gate else 0
    return 6 * shape.hidden_size * shape.shared_expert_size + gate


def _padding_rows(shape: MoeShape, rows: int, factor: float | None) -> int:
    """Rows of zeros of one layer when no token is dropped or more than fill the capacity."""
    if factor is None:
        return 0
    # Megatron-Core's get_capacity (moe_utils.py), called with T * K tokens.
    capacity = -(-rows * factor // shape.num_moe_experts)
    return max(0, int(capacity) * shape.num_moe_experts - rows)
