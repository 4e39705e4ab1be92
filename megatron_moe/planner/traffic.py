"""Bytes that one optimizer step puts into collectives, by group: counts, not times.

The counterpart of `bench/traffic.py`, which counts them while a step runs; a test compares the two.
A byte is counted as it is given to the collective, and summed over all ranks:

    all_reduce, broadcast  its tensor          all_to_all  what a rank gives, its own part too
    all_gather             the gathered whole  send        what is sent
    reduce_scatter         the whole before

So a sum does not depend on where the router sends tokens: over all ranks every choice is one row.
`sent_per_rank` turns the sums into what must leave a rank, whatever the algorithm.

Counted is a step without recomputation, with the alltoall dispatcher and the distributed optimizer.
Under cp, keys and values are gathered and their gradients scattered, as `model/attention.py` does;
Transformer Engine sends as many bytes round a ring forward, and twice as many backward.
"""

from __future__ import annotations

from collections import Counter

from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.planner.memory import StatePrecision, buffer_elements
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Workload

Traffic = dict[tuple[str, str], int]
"""Bytes by group and kind of collective, over all ranks; groups of one rank are left out."""

FP32, INT64, INT32 = 4, 8, 4
GRADIENT = StatePrecision().gradient


def step_traffic(
    shape: MoeShape,
    work: Workload,
    degrees: Degrees,
    *,
    balancing: bool = True,
    padded_rows: int | None = None,
) -> Traffic:
    """What one step puts into the collectives of the model and of its gradients.

    Args:
        shape: The model.
        work: The batch; nothing is recomputed.
        degrees: The layout.
        balancing: The balancing loss is of the micro-batch: loads are summed over tp and cp.
        padded_rows: Rows that a rank sends of one micro-batch in a layer, where experts are padded
            to their capacity; None: every token goes to K experts.
    """
    assert work.recompute == "none", work.recompute
    found: Counter[tuple[str, str]] = Counter()
    for part in (
        _attention(shape, work, degrees),
        _ends(shape, work, degrees),
        _experts(shape, work, degrees, padded_rows),
        _replicated(shape, degrees),
        _replicas(shape, work, degrees),
        _stages(shape, work, degrees),
    ):
        found.update(part)
    if balancing:
        calls = degrees.gpus // degrees.pp * shape.num_moe_layers * work.micro_batches(degrees)
        found["tp_cp", "all_reduce"] += calls * shape.num_moe_experts * INT64
    sizes = group_sizes(degrees)
    return {key: count for key, count in found.items() if count and sizes[key[0]] > 1}


def group_sizes(degrees: Degrees) -> dict[str, int]:
    """Ranks of a group of each name."""
    d = degrees
    return {
        "tp": d.tp, "cp": d.cp, "pp": d.pp, "dp_cp": d.dp * d.cp, "ep": d.ep, "etp": d.etp,
        "edp": d.edp, "etp_ep": d.etp * d.ep, "tp_cp": d.tp * d.cp,
        "embedding": 2 if d.pp > 1 else 1, "optimizer": d.gpus,
    }  # fmt: skip


def sent_per_rank(traffic: Traffic, degrees: Degrees) -> dict[str, float]:
    """Bytes that leave a rank by group, mean over ranks, if no byte is sent that need not be.

    Of a whole that ``n`` ranks share each has a part already, so ``(n - 1) / n`` must travel; a sum
    that all need travels twice.
    """
    sizes, sent = group_sizes(degrees), dict[str, float]()
    for (group, kind), count in traffic.items():
        times = {"all_reduce": 2, "send": sizes[group] / max(1, sizes[group] - 1)}.get(kind, 1)
        share = (sizes[group] - 1) / sizes[group] * times
        sent[group] = sent.get(group, 0.0) + count * share / degrees.gpus
    return sent


def _attention(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Of every layer: the sequence gathered for what tp shares, and keys and values over cp."""
    ranks, batches = degrees.gpus // degrees.pp, work.micro_batches(degrees)
    # Forward one gather and one scatter; backward one of each, and the input gathered again.
    shared_by_tp = shape.num_layers + shape.num_dense_layers
    shared_by_tp += shape.num_moe_layers * (shape.shared_expert_size > 0)
    block = ranks * batches * _tokens(work, degrees) * shape.hidden_size * work.bytes_per_value
    kv = work.sequence_length * work.micro_batch_size * shape.kv_width // degrees.tp
    keys_and_values = 2 * ranks * batches * shape.num_layers * kv * work.bytes_per_value
    return {
        ("tp", "all_gather"): 3 * shared_by_tp * block,
        ("tp", "reduce_scatter"): 2 * shared_by_tp * block,
        ("cp", "all_gather"): keys_and_values,
        ("cp", "reduce_scatter"): keys_and_values,
    }


def _ends(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Embedding and output layer, whose vocabulary tp shares."""
    ranks, batches = degrees.gpus // degrees.pp, work.micro_batches(degrees)
    tokens = _tokens(work, degrees)
    block = ranks * batches * tokens * shape.hidden_size * work.bytes_per_value
    # Cross entropy: the largest logit, the label's logit and the sum, fp32, a number a token.
    return {
        ("tp", "all_gather"): 3 * block,
        ("tp", "reduce_scatter"): 2 * block,
        ("tp", "all_reduce"): ranks * batches * 3 * tokens * FP32,
    }


def _experts(shape: MoeShape, work: Workload, degrees: Degrees, padded_rows: int | None) -> Traffic:
    """Rows to their experts and back, with their weights; and who gets how many."""
    rows = work.sequence_length * work.global_batch_size * shape.moe_router_topk
    calls = degrees.gpus // degrees.pp * work.micro_batches(degrees)
    if padded_rows is not None:
        rows = calls * padded_rows
    row = shape.hidden_size * work.bytes_per_value
    there_and_back = shape.num_moe_layers * rows * (4 * row + 2 * FP32)
    # The partial sums of etp ranks are added in the router's precision, whatever the model's is.
    partial_sum = shape.hidden_size * FP32
    over_etp = shape.num_moe_layers * degrees.etp * rows * (row + FP32 + partial_sum)
    counts = degrees.etp * degrees.ep * shape.num_moe_experts * INT64
    return {
        ("ep", "all_to_all"): there_and_back,
        ("etp", "all_gather"): over_etp,
        ("etp", "reduce_scatter"): over_etp,
        ("etp_ep", "all_gather"): shape.num_moe_layers * calls * counts * (padded_rows is None),
    }


def _replicated(shape: MoeShape, degrees: Degrees) -> Traffic:
    """Gradients of what every tp rank holds whole but sees a part of the sequence for."""
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    norms += 2 * shape.num_layers * shape.kv_channels * shape.qk_layernorm
    routers = shape.num_moe_layers * sum(shape.router_sizes.values())
    return {("tp", "all_reduce"): degrees.gpus // degrees.pp * (norms + routers) * GRADIENT}


def _replicas(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Gradients to the rank that updates them and weights back, once a step; tokens, and the norm.

    Dense parameters have dp * cp replicas and experts edp.
    """
    found: Counter[tuple[str, str]] = Counter()
    ranks = degrees.gpus // degrees.pp
    for pp_rank in range(degrees.pp):
        dense, experts = buffer_elements(shape, degrees, pp_rank=pp_rank)
        for group, elements in (("dp_cp", dense), ("edp", experts)):
            found[group, "reduce_scatter"] += ranks * elements * GRADIENT
            found[group, "all_gather"] += ranks * elements * work.bytes_per_value
    found["dp_cp", "all_reduce"] += degrees.gpus * INT32  # tokens of the batch
    found["optimizer", "all_reduce"] += degrees.gpus * FP32  # the norm's square
    return found


def _stages(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Activations to the next stage and gradients back; a tied embedding's two gradients."""
    ranks, batches = degrees.gpus // degrees.pp, work.micro_batches(degrees)
    tokens = _tokens(work, degrees) // degrees.tp
    handed = tokens * shape.hidden_size * work.bytes_per_value
    neighbours = degrees.pp * degrees.vpp - 1
    tied = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp * shape.hidden_size
    return {
        ("pp", "send"): 2 * ranks * batches * neighbours * handed,
        ("embedding", "all_reduce"): 2 * ranks * tied * GRADIENT * shape.tied_embeddings,
    }


def _tokens(work: Workload, degrees: Degrees) -> int:
    """Tokens of a micro-batch that the tp ranks of one cp rank share."""
    return work.sequence_length * work.micro_batch_size // degrees.cp
