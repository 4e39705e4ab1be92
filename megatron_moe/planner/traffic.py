"""Count the bytes that one optimizer step passes to collectives, by group.

`bench/traffic.py` counts the same bytes while a step runs; a test compares the two. Bytes are
counted as they are passed to the collective, and summed over all ranks:

    all_reduce, broadcast  the tensor             all_to_all  a rank's input, its own part included
    all_gather             the gathered tensor    send        the tensor sent
    reduce_scatter         the unreduced tensor

A sum does not depend on where the router sends tokens: over all ranks, each choice is one row.
`sent_per_rank` converts the sums into the bytes that must leave a rank, whatever the algorithm.

The counts are for a step without recomputation, with the alltoall dispatcher and the distributed
optimizer, or Muon's. Under cp, keys and values are gathered and their gradients scattered, as in
`model/attention.py`; Transformer Engine sends the same number of bytes around a ring in the
forward pass, and twice as many in the backward pass.
"""

from __future__ import annotations

from collections import Counter

from megatron_moe.config.parts import Role
from megatron_moe.hf.names import Sharding, match
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.planner.by_matrix import is_matrix
from megatron_moe.planner.memory import buffer_elements, has_own_replicas
from megatron_moe.planner.parameters import rank_tensors
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Workload

SHARDED_MATRICES = (Sharding.QKV, Sharding.GATED, Sharding.COLUMNS)

Traffic = dict[tuple[str, str], int]
"""Bytes by group and kind of collective, over all ranks, without groups of one rank."""

FP32, INT64, INT32 = 4, 8, 4


def step_traffic(
    shape: MoeShape,
    work: Workload,
    degrees: Degrees,
    *,
    balancing: bool = True,
    padded_rows: int | None = None,
) -> Traffic:
    """Count the bytes that one step passes to the collectives of the model and its gradients.

    Args:
        shape: The model.
        work: The batch; its ``recompute`` must be "none".
        degrees: The layout.
        balancing: Whether the balancing loss covers a micro-batch, so that loads are summed over
            tp and cp.
        padded_rows: Rows that a rank sends per micro-batch and layer if experts are padded to
            their capacity; None means that every token goes to K experts.
    """
    assert work.recompute == "none", work.recompute
    traffic: Counter[tuple[str, str]] = Counter()
    for part in (
        _attention(shape, work, degrees),
        _ends(shape, work, degrees),
        _experts(shape, work, degrees, padded_rows),
        _replicated(shape, work, degrees),
        _replicas(shape, work, degrees),
        _stages(shape, work, degrees),
    ):
        traffic.update(part)
    if balancing:
        calls = degrees.gpus // degrees.pp * shape.num_moe_layers * work.micro_batches(degrees)
        traffic["tp_cp", "all_reduce"] += calls * shape.num_moe_experts * INT64
    sizes = group_sizes(degrees)
    return {key: count for key, count in traffic.items() if count and sizes[key[0]] > 1}


def group_sizes(degrees: Degrees) -> dict[str, int]:
    """Return the number of ranks of each group."""
    d = degrees
    return {
        "tp": d.tp, "cp": d.cp, "pp": d.pp, "dp_cp": d.dp * d.cp, "ep": d.ep, "etp": d.etp,
        "edp": d.edp, "etp_ep": d.etp * d.ep, "tp_cp": d.tp * d.cp,
        "embedding": 2 if d.pp > 1 else 1, "optimizer": d.gpus,
    }  # fmt: skip


def sent_per_rank(traffic: Traffic, degrees: Degrees) -> dict[str, float]:
    """Return the minimum bytes that a rank must send, by group, as the mean over ranks.

    Each of ``n`` ranks already holds its part of a shared tensor, so ``(n - 1) / n`` of it must be
    sent; the tensor of an all-reduce is sent twice.
    """
    sizes, sent = group_sizes(degrees), dict[str, float]()
    for (group, kind), count in traffic.items():
        times = {"all_reduce": 2, "send": sizes[group] / max(1, sizes[group] - 1)}.get(kind, 1)
        share = (sizes[group] - 1) / sizes[group] * times
        sent[group] = sent.get(group, 0.0) + count * share / degrees.gpus
    return sent


def _attention(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Count, for all layers, tp collectives of the sequence and cp ones of keys and values."""
    ranks, batches = degrees.gpus // degrees.pp, work.micro_batches(degrees)
    # One gather and one scatter forward; one of each backward, plus a second gather of the input.
    shared_by_tp = shape.num_layers + shape.num_dense_layers
    shared_by_tp += shape.num_moe_layers * (shape.shared_expert_size > 0)
    # A frozen matrix does not need its input in the backward pass.
    again = sum(
        shape.trained_layers(role, work.frozen)
        for role in ("attention", "dense_ffn", "shared_experts")
    )
    block = ranks * batches * _tokens(work, degrees) * shape.hidden_size * work.bytes_per_value
    kv = work.sequence_length * work.micro_batch_size * shape.kv_width_of_rank(degrees.tp)
    keys_and_values = 2 * ranks * batches * shape.num_layers * kv * work.bytes_per_value
    # With more tp ranks than query groups, the output of the fused projection is gathered.
    fused = shape.query_width + 2 * shape.kv_width
    fused *= shape.num_layers * (degrees.tp > shape.num_query_groups)
    # The products of an adapter's A: one gather and one scatter forward, one of each backward.
    fused += 2 * shape.num_layers * shape.adapter_rank("attention")
    fused_bytes = ranks * batches * _tokens(work, degrees) * fused * work.bytes_per_value
    return {
        ("tp", "all_gather"): (2 * shared_by_tp + again) * block + fused_bytes,
        ("tp", "reduce_scatter"): 2 * shared_by_tp * block + fused_bytes,
        ("cp", "all_gather"): keys_and_values,
        ("cp", "reduce_scatter"): keys_and_values,
    }


def _ends(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Count the embedding and the output layer, whose vocabulary is sharded over tp."""
    ranks, batches = degrees.gpus // degrees.pp, work.micro_batches(degrees)
    tokens = _tokens(work, degrees)
    block = ranks * batches * tokens * shape.hidden_size * work.bytes_per_value
    # Cross entropy: the largest logit, the label's logit and the sum, one fp32 value per token.
    return {
        # The gradient of the embedding's output, and the output layer's input, twice.
        ("tp", "all_gather"): (1 if "embeddings" in work.frozen else 3) * block,
        ("tp", "reduce_scatter"): 2 * block,
        ("tp", "all_reduce"): ranks * batches * 3 * tokens * FP32,
    }


def _experts(shape: MoeShape, work: Workload, degrees: Degrees, padded_rows: int | None) -> Traffic:
    """Count the dispatch and combine of rows with router weights, and the counts per expert."""
    rows = work.sequence_length * work.global_batch_size * shape.moe_router_topk
    calls = degrees.gpus // degrees.pp * work.micro_batches(degrees)
    if padded_rows is not None:
        rows = calls * padded_rows
    row = shape.hidden_size * work.bytes_per_value
    there_and_back = shape.num_moe_layers * rows * (4 * row + 2 * FP32)
    # The partial sums of etp ranks are reduced in the router's dtype, not in the model's.
    partial_sum = shape.hidden_size * FP32
    over_etp = shape.num_moe_layers * degrees.etp * rows * (row + FP32 + partial_sum)
    counts = degrees.etp * degrees.ep * shape.num_moe_experts * INT64
    return {
        ("ep", "all_to_all"): there_and_back,
        ("etp", "all_gather"): over_etp,
        ("etp", "reduce_scatter"): over_etp,
        ("etp_ep", "all_gather"): shape.num_moe_layers * calls * counts * (padded_rows is None),
    }


def _replicated(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Count the gradients of parameters that tp replicates while it shards the sequence."""
    norms = 2 * shape.hidden_size
    if not shape.qk_norm_spans_heads:
        norms += 2 * shape.kv_channels * shape.qk_layernorm
    trained = shape.hidden_size * ("norms" not in work.frozen)  # the final norm
    in_layer: dict[Role, int] = {
        "norms": norms,
        "router": sum(shape.router_sizes.values()),
        "shared_experts": shape.hidden_size * shape.shared_expert_gate,
        "adapters": 2 * shape.hidden_size * shape.adapter_rank("attention"),
    }
    for role, of_layer in in_layer.items():
        trained += shape.trained_layers(role, work.frozen) * of_layer
    return {("tp", "all_reduce"): degrees.gpus // degrees.pp * trained * work.state.gradient}


def _replicas(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Count the gradient reduce-scatter, the weight all-gather, the token count and the norm.

    Each occurs once a step. Dense parameters have dp * cp replicas and experts have edp.
    """
    by_matrix = work.optimizer == "muon"
    traffic = Counter(_by_matrix(shape, work, degrees)) if by_matrix else Counter()
    ranks = degrees.gpus // degrees.pp
    for pp_rank in range(0 if by_matrix else degrees.pp):
        dense, experts = buffer_elements(shape, degrees, pp_rank=pp_rank, frozen=work.frozen)
        for group, elements in (("dp_cp", dense), ("edp", experts)):
            traffic[group, "reduce_scatter"] += ranks * elements * work.state.gradient
            traffic[group, "all_gather"] += ranks * elements * work.bytes_per_value
    traffic["dp_cp", "all_reduce"] += degrees.gpus * INT32  # tokens of the batch
    # The squared norm; optimizers of matrices, of others and of experts have one each if Muon's
    # state is not sharded.
    norms = 2 + has_own_replicas(degrees) if by_matrix and degrees.dp * degrees.cp == 1 else 1
    traffic["optimizer", "all_reduce"] += norms * degrees.gpus * FP32
    return traffic


def _by_matrix(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Count, with Muon, the all-reduce of gradients, and the gathers of weights and of matrices.

    Each matrix is gathered over tp, or etp, on the replica that updates it. With one replica of
    attention the state is not sharded, and every replica of an expert updates it.
    """
    traffic: Counter[tuple[str, str]] = Counter()
    ranks, sharded = degrees.gpus // degrees.pp, degrees.dp * degrees.cp > 1
    chunks = (rank_tensors(shape, degrees, pp_rank=pp_rank) for pp_rank in range(degrees.pp))
    for tensor in (tensor for stage in chunks for chunk in stage for tensor in chunk):
        if work.frozen.covers(tensor.part):
            continue
        apart = tensor.expert and has_own_replicas(degrees)
        replicas, group = (degrees.edp, "edp") if apart else (degrees.dp * degrees.cp, "dp_cp")
        traffic[group, "all_reduce"] += ranks * tensor.numel * work.state.gradient
        traffic[group, "all_gather"] += ranks * tensor.numel * work.bytes_per_value * sharded
        parsed = match(tensor.name)
        if is_matrix(tensor) and parsed and parsed.row.sharding in SHARDED_MATRICES:
            axis, size = ("etp", degrees.etp) if tensor.expert else ("tp", degrees.tp)
            updating = ranks // replicas if sharded else ranks
            traffic[axis, "all_gather"] += updating * size * tensor.numel * work.state.momentum
    return traffic


def _stages(shape: MoeShape, work: Workload, degrees: Degrees) -> Traffic:
    """Count the sends between pipeline stages and the gradient all-reduce of a tied embedding."""
    ranks, batches = degrees.gpus // degrees.pp, work.micro_batches(degrees)
    tokens = _tokens(work, degrees) // degrees.tp
    sent = tokens * shape.hidden_size * work.bytes_per_value
    neighbors = degrees.pp * degrees.vpp - 1
    tied = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp * shape.hidden_size
    tied *= shape.tied_embeddings and "embeddings" not in work.frozen
    return {
        ("pp", "send"): 2 * ranks * batches * neighbors * sent,
        ("embedding", "all_reduce"): 2 * ranks * tied * work.state.gradient,
    }


def _tokens(work: Workload, degrees: Degrees) -> int:
    """Return the tokens of a micro-batch that the tp ranks of one cp rank share."""
    return work.sequence_length * work.micro_batch_size // degrees.cp
