"""Enumerate the layouts of a search: degrees of parallelism that satisfy all divisibility rules.

This is a fast version of the rules that ``rules/check.py`` explains; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees

MICRO_BATCH_SIZES = (1, 2, 4, 8)


def layouts(
    shape: MoeShape, *, gpus: int, sequence_length: int, gpus_per_node: int = 8
) -> Iterator[Degrees]:
    """Yield the legal degrees on ``gpus`` ranks with vpp 1; `chunkings` returns the other vpp.

    tp and etp stay within a node, because both exchange every activation of every layer.
    """
    for pp in divisors(shape.num_layers):
        if gpus % pp:
            continue
        stage = gpus // pp
        grids = list(_expert_grids(shape, stage, gpus_per_node))
        for tp in range(1, gpus_per_node + 1):
            if stage % tp or not _shards_heads(shape, tp) or not _divides_ffns(shape, tp):
                continue
            for cp in divisors(stage // tp):
                unit = 2 * cp * tp if cp > 1 else tp
                if sequence_length % unit:
                    continue
                for ep, etp in grids:
                    yield Degrees(gpus=gpus, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def chunkings(shape: MoeShape, degrees: Degrees, *, micro_batches: int) -> tuple[int, ...]:
    """Return the values of vpp that the layout allows for ``micro_batches``, largest first."""
    if degrees.pp == 1 or micro_batches % degrees.pp:
        return (1,)
    return divisors(shape.num_layers // degrees.pp)[::-1]


@lru_cache(maxsize=1024)
def divisors(n: int) -> tuple[int, ...]:
    """Return the divisors of ``n`` in ascending order.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _expert_grids(shape: MoeShape, stage: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    for ep in divisors(shape.num_moe_experts):
        for etp in divisors(gpus_per_node):
            if stage % (ep * etp) == 0 and shape.moe_ffn_hidden_size % etp == 0:
                yield ep, etp


def _shards_heads(shape: MoeShape, tp: int) -> bool:
    """Return whether ranks hold whole query groups, or equally many ranks share each group."""
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    fused_rows = shape.query_width + 2 * shape.kv_width
    return not heads % tp and not (groups % tp and tp % groups) and not fused_rows % tp


def _divides_ffns(shape: MoeShape, tp: int) -> bool:
    dense = shape.ffn_hidden_size if shape.num_dense_layers else 0
    return dense % tp == 0 and shape.shared_expert_size % tp == 0
