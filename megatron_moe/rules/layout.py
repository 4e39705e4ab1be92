"""Rules of the degrees of parallelism: what they must divide, and what must divide them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from megatron_moe.errors import nearest_multiples
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.parallel.layout import indivisible_world, split_of
from megatron_moe.parallel.stages import EVEN, layout_blocks, stage_sizes
from megatron_moe.rules.case import Case, indivisible


def world(case: Case) -> Iterator[str]:
    """Check that the degrees divide the world size."""
    p = case.config.parallel
    for axis, degrees in (
        ("dp", {"pp": p.pipeline_parallel_size, "cp": p.context_parallel_size,
                "tp": p.tensor_parallel_size}),
        ("edp", {"pp": p.pipeline_parallel_size, "ep": p.expert_parallel_size,
                 "etp": p.expert_tensor_parallel_size}),
    ):  # fmt: skip
        if message := indivisible_world(axis, case.world_size, degrees):
            yield message


def heads(case: Case) -> Iterator[str]:
    """Check that tp can shard the attention heads."""
    tp, spec = case.config.parallel.tensor_parallel_size, case.spec
    if not shards_heads(spec, tp):
        valid = (str(n) for n in range(1, spec.num_attention_heads + 1) if shards_heads(spec, n))
        yield (
            f"parallel.tensor_parallel_size ({tp}) must divide num_attention_heads of the dense "
            f"model ({spec.num_attention_heads}), and divide num_key_value_heads "
            f"({spec.num_query_groups}) or be a multiple of it, and divide the rows of the fused "
            f"projection ({fused_rows(spec)}): a tp rank holds whole query groups, or equally many "
            "ranks share each group.\n"
            f"  valid tensor_parallel_size: {', '.join(valid)}"
        )
    elif spec.qk_norm_spans_heads and spec.num_query_groups % tp:
        yield indivisible(
            "num_key_value_heads of the source model", spec.num_query_groups,
            "parallel.tensor_parallel_size", tp,
            "its norm of the key is over all heads, each of which belongs to one tp rank",
        )  # fmt: skip


def shards_heads(spec: ModelSpec, tp: int) -> bool:
    """Return whether Megatron-Core can shard the attention of a model over tp ranks."""
    heads, groups = spec.num_attention_heads, spec.num_query_groups
    return not heads % tp and not (groups % tp and tp % groups) and not fused_rows(spec) % tp


def fused_rows(spec: ModelSpec) -> int:
    """Return the rows of the fused projection to query, key and value."""
    return (spec.num_attention_heads + 2 * spec.num_query_groups) * spec.kv_channels


def experts(case: Case) -> Iterator[str]:
    """Check that ep, etp and K match the experts."""
    moe, p = case.config.moe, case.config.parallel
    if moe.num_moe_experts % p.expert_parallel_size:
        yield indivisible(
            "moe.num_moe_experts", moe.num_moe_experts,
            "parallel.expert_parallel_size", p.expert_parallel_size,
            "each ep rank holds whole experts",
        )  # fmt: skip
    if case.expert_ffn % p.expert_tensor_parallel_size:
        yield indivisible(
            "moe.moe_ffn_hidden_size", case.expert_ffn,
            "parallel.expert_tensor_parallel_size", p.expert_tensor_parallel_size,
            "every etp rank must hold an equal share of an expert's neurons",
        )  # fmt: skip
    if moe.moe_router_topk > moe.num_moe_experts:
        yield (
            f"moe.moe_router_topk ({moe.moe_router_topk}) must be at most moe.num_moe_experts "
            f"({moe.num_moe_experts}): a token is routed to distinct experts.\n"
            f"  largest moe.moe_router_topk: {moe.num_moe_experts}"
        )
    softmax = moe.moe_router_score_function == "softmax"
    several = moe.num_moe_experts > 1  # a single expert needs no router
    if several and moe.moe_router_topk == 1 and moe.router_order == "topk_softmax" and softmax:
        yield (
            "moe.moe_router_topk (1) with moe.router_order (topk_softmax) is not trainable: the "
            "softmax over one chosen expert is always 1, so the router gets no gradient.\n"
            "  set moe.router_order=softmax_topk or moe.moe_router_topk=2"
        )


def dense_ffn(case: Case) -> Iterator[str]:
    """Check that tp divides the FFN of layers that stay dense."""
    tp = case.config.parallel.tensor_parallel_size
    some_dense = len(moe_layer_ids(case.config.moe, case.spec.num_layers)) < case.spec.num_layers
    if some_dense and case.spec.ffn_hidden_size % tp:
        yield indivisible(
            "intermediate_size of the dense model", case.spec.ffn_hidden_size,
            "parallel.tensor_parallel_size", tp, "the layers that stay dense are sharded over tp",
        )  # fmt: skip


def pipeline(case: Case) -> Iterator[str]:
    """Check that pp and vpp divide the layers."""
    pp, layers = case.config.parallel.pipeline_parallel_size, case.spec.num_layers
    if case.config.parallel.pipeline_model_parallel_layout is not None:
        return  # see `pipeline_layout`
    if case.vpp > 1 and pp == 1:
        yield (
            f"parallel.virtual_pipeline_parallel_size ({case.vpp}) needs "
            "parallel.pipeline_parallel_size of at least 2: chunks are interleaved between stages."
            "\n  leave parallel.virtual_pipeline_parallel_size unset"
        )
    elif (split := split_of(case.config.parallel)) != EVEN:
        sizes = stage_sizes(layers, pp, split)
        if pp == 1 or sizes is None or any(size % case.vpp for size in sizes):
            yield (
                f"parallel.num_layers_in_first_pipeline_stage ({split.first or 'unset'}) and "
                f"num_layers_in_last_pipeline_stage ({split.last or 'unset'}) must leave equal "
                f"numbers of the {layers} layers to all other stages (pp = {pp}), and vpp = "
                f"{case.vpp} must divide the layers of every stage.\n"
                f"  {_uneven(layers, pp, case.vpp) or 'leave both unset'}"
            )
    elif layers % (pp * case.vpp):
        fits = [f"{a}x{b}" for a in range(1, layers + 1) for b in range(1, layers // a + 1)
                if layers % (a * b) == 0 and (a > 1 or b == 1)]  # fmt: skip
        near = sorted(fits, key=lambda ab: abs(math.prod(map(int, ab.split("x"))) - pp * case.vpp))
        yield (
            f"num_hidden_layers of the dense model ({layers}) must be divisible by "
            f"pp * vpp = {pp} * {case.vpp} = {pp * case.vpp}: every chunk must hold the same "
            "number of layers.\n"
            f"  nearest pp x vpp: {', '.join(near[:4])}"
            + (f"\n  or set {uneven}" if (uneven := _uneven(layers, pp, case.vpp)) else "")
        )


def pipeline_layout(case: Case) -> Iterator[str]:
    """Check that a manual layout has the embedding, all layers and the loss, in pp * vpp chunks."""
    p, layers = case.config.parallel, case.spec.num_layers
    layout, pp = p.pipeline_model_parallel_layout, p.pipeline_parallel_size
    if layout is None:
        return
    setting = f"parallel.pipeline_model_parallel_layout ({layout})"
    try:
        blocks = layout_blocks(layout)
    except ValueError as error:
        yield f"{setting} is no layout: {error}"
        return
    for end in ("first", "last"):
        if (size := getattr(p, f"num_layers_in_{end}_pipeline_stage")) is not None:
            yield (
                f"{setting} and parallel.num_layers_in_{end}_pipeline_stage ({size}) both say how "
                f"many layers a stage has.\n  remove one of them"
            )
    if pp == 1 or len(blocks) != pp * case.vpp:
        yield (
            f"{setting} has {len(blocks)} chunks, which must be pp * vpp = {pp} * {case.vpp} = "
            f"{pp * case.vpp}, with pp of at least 2: each rank of the pipeline holds vpp of them."
            f"\n  {_layout_example(layers, max(pp, 2), case.vpp)}"
        )
    elif re.fullmatch(f"Et{{{layers}}}L", "".join(blocks)) is None:
        yield (
            f"{setting} must have E first, then a t for each of the {layers} layers, and L last: "
            f"it is {'|'.join(blocks)}, with {''.join(blocks).count('t')} layers.\n"
            f"  {_layout_example(layers, pp, case.vpp)}"
        )
    elif not all(blocks):
        yield (
            f"{setting} has a chunk without anything: its rank would have no parameters.\n"
            f"  {_layout_example(layers, pp, case.vpp)}"
        )


def _layout_example(layers: int, pp: int, vpp: int) -> str:
    """Return a layout whose chunks differ by one layer at most."""
    chunks = pp * vpp
    sizes = [layers // chunks + (i >= chunks - layers % chunks) for i in range(chunks)]
    words = [f"t*{size}" if size > 1 else "t" * size for size in sizes]
    return (
        f"for example parallel.pipeline_parallel_size={pp} "
        f"parallel.pipeline_model_parallel_layout='E{'|'.join(words)}L'"
    )


def _uneven(layers: int, pp: int, vpp: int) -> str | None:
    """Return settings for stages of about the same size, the first and the last the smallest."""
    for middle in range(vpp, layers + 1, vpp):
        left = layers - (pp - 2) * middle
        first = left // 2 // vpp * vpp
        if pp > 1 and 0 < left - first <= middle and first > 0 and not (left - first) % vpp:
            return (
                f"parallel.num_layers_in_first_pipeline_stage={first} "
                f"parallel.num_layers_in_last_pipeline_stage={left - first}"
            )
    return None


def sequence(case: Case) -> Iterator[str]:
    """Check that cp and tp divide the sequence, and that the dense model supports its length."""
    p, length = case.config.parallel, case.config.data.seq_length
    tp, cp = p.tensor_parallel_size, p.context_parallel_size
    # Zigzag context parallelism divides the sequence into 2 * cp chunks; each cp rank's slice is
    # then scattered over tp (sequence parallelism).
    unit = (2 * cp if cp > 1 else 1) * tp
    if length % unit:
        names = "2 * cp * tp" if cp > 1 else "tp"
        yield (
            f"data.seq_length ({length}) must be divisible by {names} = {unit}: the sequence is "
            "sharded over these ranks.\n"
            f"  nearest data.seq_length: {nearest_multiples(length, unit)}"
        )
    if length > case.spec.max_position_embeddings:
        yield (
            f"data.seq_length ({length}) must be at most the dense model's "
            f"max_position_embeddings ({case.spec.max_position_embeddings}): it was not "
            "trained on later positions.\n"
            f"  largest data.seq_length: {case.spec.max_position_embeddings}"
        )


def tp_overlap(case: Case) -> Iterator[str]:
    """Check that there is tp communication, and that the engine can overlap it."""
    if not case.config.train.tp_comm_overlap:
        return
    if case.config.run.engine == "torch":
        yield (
            "train.tp_comm_overlap (true) needs run.engine to be transformer_engine: only its "
            "linear layers overlap communication with matrix products.\n"
            "  leave train.tp_comm_overlap unset"
        )
    if case.config.parallel.tensor_parallel_size == 1:
        yield (
            "train.tp_comm_overlap (true) needs parallel.tensor_parallel_size (1) to be at least "
            "2: there is no communication to overlap.\n  leave train.tp_comm_overlap unset"
        )


def expert_overlap(case: Case) -> Iterator[str]:
    """Check that tokens are exchanged between ranks, and that the schedule takes passes in pairs.

    Megatron-Core requires the same, but for the number of micro-batches.
    """
    p, train = case.config.parallel, case.config.train
    if not train.overlap_moe_expert_parallel_comm:
        return
    setting = "train.overlap_moe_expert_parallel_comm (true)"
    way_out = "leave train.overlap_moe_expert_parallel_comm unset"
    pp, ep = p.pipeline_parallel_size, p.expert_parallel_size
    if ep == 1:
        yield (
            f"{setting} needs parallel.expert_parallel_size (1) to be at least 2: no tokens are "
            f"exchanged between ranks.\n  {way_out}"
        )
    if pp > 1 and case.vpp == 1:
        yield (
            f"{setting} with parallel.pipeline_parallel_size ({pp}) needs "
            "parallel.virtual_pipeline_parallel_size (1) to be at least 2: only the interleaved "
            "schedule pairs the forward pass of one micro-batch with the backward pass of another."
            f"\n  set parallel.virtual_pipeline_parallel_size=2, or {way_out}"
        )
    model = pp * p.context_parallel_size * p.tensor_parallel_size
    unit = train.micro_batch_size * case.world_size // model
    if pp == 1 and case.world_size % model == 0 and train.global_batch_size == unit:
        yield (
            f"{setting} needs at least two micro-batches in a step, but train.global_batch_size "
            f"({train.global_batch_size}) / (micro_batch_size * dp) is 1: there is no other one to "
            f"compute meanwhile.\n  smallest train.global_batch_size: {2 * unit}"
        )


def batch(case: Case) -> Iterator[str]:
    """Check that replicas get whole micro-batches, and an interleaved schedule whole rounds."""
    p, train = case.config.parallel, case.config.train
    model = p.pipeline_parallel_size * p.context_parallel_size * p.tensor_parallel_size
    if case.world_size % model:
        return  # dp is not defined, which `world` reports
    dp = case.world_size // model
    unit = train.micro_batch_size * dp
    if train.global_batch_size % unit:
        yield (
            f"train.global_batch_size ({train.global_batch_size}) must be divisible by "
            f"train.micro_batch_size * dp = {train.micro_batch_size} * {dp} = {unit}: every "
            "replica processes whole micro-batches.\n  nearest train.global_batch_size: "
            f"{nearest_multiples(train.global_batch_size, unit)}"
        )
    elif case.vpp > 1 and (train.global_batch_size // unit) % p.pipeline_parallel_size:
        yield (
            f"micro-batches of a step (train.global_batch_size / (micro_batch_size * dp) = "
            f"{train.global_batch_size // unit}) must be divisible by "
            f"parallel.pipeline_parallel_size ({p.pipeline_parallel_size}) with "
            "virtual_pipeline_parallel_size: the interleaved schedule runs them in rounds.\n"
            "  nearest train.global_batch_size: "
            f"{nearest_multiples(train.global_batch_size, unit * p.pipeline_parallel_size)}"
        )


def batch_ramp(case: Case) -> Iterator[str]:
    """Check that the batch grows in equal parts, and that each of its sizes suits the layout."""
    p, train = case.config.parallel, case.config.train
    ramp = train.rampup_batch_size
    model = p.pipeline_parallel_size * p.context_parallel_size * p.tensor_parallel_size
    if ramp is None or case.world_size % model:
        return
    growth = train.global_batch_size - ramp.start
    if growth <= 0 or growth % ramp.increment:
        yield (
            f"train.global_batch_size ({train.global_batch_size}) minus "
            f"train.rampup_batch_size.start ({ramp.start}) must be a multiple of "
            f"train.rampup_batch_size.increment ({ramp.increment}): the batch grows by increments."
            "\n  set train.rampup_batch_size.increment to a divisor of the difference"
        )
    unit = train.micro_batch_size * case.world_size // model
    unit *= p.pipeline_parallel_size if case.vpp > 1 else 1
    for name, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % unit:
            yield (
                f"train.rampup_batch_size.{name} ({value}) must be divisible by "
                f"train.micro_batch_size * dp (* pp if chunks are interleaved) = {unit}: every "
                "batch of the ramp consists of whole micro-batches of each replica.\n"
                f"  nearest train.rampup_batch_size.{name}: {nearest_multiples(value, unit)}"
            )
