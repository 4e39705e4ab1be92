"""Count the bytes a rank keeps for the backward pass, by tensor, and the micro-batches in flight.

The tensors are those that autograd saves in Megatron-Core 0.19 with Transformer Engine or flash
attention, which keep no scores. The torch engine keeps a few more tensors, and lacks one.
Activations between tp regions are sharded along the sequence (sequence parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Recompute, Workload

NORM_OUTPUTS = ("attention_norm_output", "ffn_norm_output")
EXPERT_TENSORS = (
    "router", "expert_input", "expert_hidden", "expert_activation", "expert_adapters",
    "shared_hidden", "shared_activation",
)  # fmt: skip
NOT_KEPT: dict[Recompute, tuple[str, ...]] = {
    "none": (),
    "selective": (*NORM_OUTPUTS, "expert_activation"),
    "moe": ("attention_norm_output", *EXPERT_TENSORS),
}
"""Saved tensors that each setting recomputes; full keeps only the layer's input. The torch engine
keeps the outputs of norms, because Megatron-Core recomputes them only with Transformer Engine."""


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """Numbers of tokens of one micro-batch on one rank."""

    sequence_parallel: float
    """Between tp regions: S * B / (cp * tp)."""
    gathered: float
    """Inside tp regions: S * B / cp."""
    expert_rows: float
    """Rows of all local experts together on the busiest rank, gathered over etp."""


def local_tokens(shape: MoeShape, work: Workload, degrees: Degrees) -> LocalTokens:
    """Return how the tokens of one micro-batch are distributed over the ranks of a stage."""
    gathered = work.sequence_length * work.micro_batch_size / degrees.cp
    sequence_parallel = gathered / degrees.tp
    rows = sequence_parallel * shape.moe_router_topk * work.busiest_load * degrees.etp
    return LocalTokens(sequence_parallel, gathered, rows)


def saved_tensors(
    shape: MoeShape, work: Workload, degrees: Degrees, *, routes: bool
) -> dict[str, float]:
    """Return the bytes of each tensor that a layer saves for a micro-batch without recomputing."""
    tokens, value = local_tokens(shape, work, degrees), work.bytes_per_value
    stream = tokens.sequence_parallel * shape.hidden_size * value
    heads = tokens.gathered / degrees.tp
    # With more tp ranks than query groups, each keeps the gathered projection of all groups.
    qkv_tokens = tokens.gathered if degrees.tp > shape.num_query_groups else heads
    saved = {
        "layer_input": stream,
        "attention_norm_output": stream,
        "qkv": qkv_tokens * (shape.query_width + 2 * shape.kv_width) * value,
        "attention_output": heads * shape.query_width * value,
        "softmax_statistics": heads * shape.num_attention_heads * 4,
        # Between A and B: of query, key and value on all tokens, of the output on this rank's.
        "adapters": (tokens.gathered + tokens.sequence_parallel)
        * shape.adapter_rank("attention")
        * value,
        "ffn_norm_input": stream,
        "ffn_norm_output": stream,
    }
    if work.engine == "torch":
        saved |= _rotary_tensors(shape, work, degrees)
    if not routes:
        hidden = heads * shape.ffn_hidden_size * value
        return saved | {"ffn_hidden": 2 * hidden, "ffn_activation": hidden}
    neurons = tokens.expert_rows * shape.moe_ffn_hidden_size / degrees.etp * value
    expert_rank = shape.adapter_rank("experts")
    keeps_activation = work.engine == "transformer_engine" or expert_rank > 0
    shared = heads * shape.shared_expert_size * value
    return saved | {
        # Logits, probabilities and the auxiliary loss's scores in fp32, the routing map in 1 byte.
        "router": tokens.sequence_parallel * shape.num_moe_experts * 13,
        # Rows, and the router probability of each.
        "expert_input": tokens.expert_rows * (shape.hidden_size * value + 4),
        "expert_hidden": 2 * neurons,
        # The torch engine's experts recompute it in the backward pass, unless they have adapters.
        "expert_activation": neurons if keeps_activation else 0.0,
        "expert_adapters": 2 * tokens.expert_rows * expert_rank * value,
        "shared_hidden": 2 * shared,
        "shared_activation": shared,
    }


def _rotary_tensors(shape: MoeShape, work: Workload, degrees: Degrees) -> dict[str, float]:
    """Return the bytes that unfused rotary embedding keeps: its outputs and its tables.

    Under cp, keys and values of all cp ranks are kept instead of this rank's.
    """
    tokens, value = local_tokens(shape, work, degrees), work.bytes_per_value
    heads = tokens.gathered / degrees.tp
    query, pair = (
        heads * shape.query_width * value,
        tokens.gathered * 2 * shape.kv_width_of_rank(degrees.tp) * value,
    )
    positions = tokens.gathered / work.micro_batch_size
    return {
        "rotated": query + pair / 2 if degrees.cp == 1 else pair * (degrees.cp - 1),
        # Cosines and sines, for queries and for keys.
        "rotary_tables": 4 * positions * shape.kv_channels * value,
    }


def kept_bytes(shape: MoeShape, work: Workload, degrees: Degrees, *, routes: bool) -> float:
    """Return the bytes that one layer keeps for a micro-batch under the recomputation setting."""
    saved = saved_tensors(shape, work, degrees, routes=routes)
    if work.recompute == "full":
        return saved["layer_input"]
    recomputed = NOT_KEPT[work.recompute]
    if work.engine == "torch":
        recomputed = tuple(name for name in recomputed if name not in NORM_OUTPUTS)
    return sum(size for name, size in saved.items() if name not in recomputed)


def chunks_in_flight(*, micro_batches: int, degrees: Degrees, pp_rank: int) -> int:
    """Return the maximum number of forward passes of a model chunk that a rank holds at once.

    It is one plus the warm-up of Megatron-Core's schedules (``get_pp_rank_microbatches``), and at
    most the number of forward passes of a step.
    """
    behind = degrees.pp - pp_rank - 1
    warm_up = behind if degrees.vpp == 1 else 2 * behind + (degrees.vpp - 1) * degrees.pp
    return min(warm_up + 1, micro_batches * degrees.vpp)


def paired_share(*, micro_batches: int, degrees: Degrees) -> float:
    """Return the share of a step's passes that ``expert_overlap`` runs in pairs, on the first rank.

    A pair is the forward pass of one micro-batch and the backward pass of another. The warm-up of
    forward passes before it has one more than the ordinary schedule (``get_pp_rank_microbatches``).
    Without interleaved chunks there are no pairs under pp.
    """
    total = micro_batches * degrees.vpp
    if degrees.pp == 1:
        return (total - 1) / total
    if degrees.vpp == 1:
        return 0.0
    warm_up = 2 * (degrees.pp - 1) + (degrees.vpp - 1) * degrees.pp + 1
    return max(0, total - warm_up) / total


def stage_activations(shape: MoeShape, work: Workload, degrees: Degrees, *, pp_rank: int) -> float:
    """Return the bytes that a rank of stage ``pp_rank`` keeps at the peak of the schedule.

    Each chunk is assumed to have the model's mean mix of MoE and dense layers. A pair of passes
    takes turns layer by layer (``expert_overlap``), so that one layer more is kept.
    """
    routed = kept_bytes(shape, work, degrees, routes=True) if shape.moe_layers else 0.0
    dense = kept_bytes(shape, work, degrees, routes=False) if shape.num_dense_layers else 0.0
    model = shape.num_moe_layers * routed + shape.num_dense_layers * dense
    in_flight = chunks_in_flight(
        micro_batches=work.micro_batches(degrees), degrees=degrees, pp_rank=pp_rank
    )
    share = degrees.stage_shares(shape.num_layers)[pp_rank] / degrees.vpp
    return in_flight * model * share + work.expert_overlap * max(routed, dense)


def recomputed_layer(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Return the bytes of the tensors of one layer that the backward pass has recomputed."""
    if work.recompute == "none":
        return 0.0
    saved = saved_tensors(shape, work, degrees, routes=bool(shape.moe_layers))
    return sum(saved.values()) - kept_bytes(shape, work, degrees, routes=bool(shape.moe_layers))
