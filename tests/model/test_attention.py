"""Tests of core attention against explicit float64 softmax, and of cp ranks against one rank.

Shape letters: S sequence, B batch, H heads, G KV groups, C head width.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.model.attention import SdpaAttention
from megatron_moe.runtime.world import World

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def attention(cp_group: object = ALONE, softmax_scale: float | None = None) -> SdpaAttention:
    groups = SimpleNamespace(cp=cp_group)
    return SdpaAttention(None, pg_collection=groups, softmax_scale=softmax_scale, layer_number=1)


def random_qkv(length: int, batch: int, heads: int, groups: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(length, batch, n, width, generator=generator, dtype=torch.float64)
        for n in (heads, groups, groups)
    ]


def by_hand(q_SBHC: Tensor, k_SBGC: Tensor, v_SBGC: Tensor, scale: float) -> Tensor:
    """Compute attention per query and head; head h uses group h // (H / G)."""
    length, batch, heads, width = q_SBHC.shape
    per_group = heads // k_SBGC.shape[2]
    out_SBHC = torch.empty_like(q_SBHC)
    for s in range(length):
        for h in range(heads):
            k_sBC, v_sBC = (x[: s + 1, :, h // per_group] for x in (k_SBGC, v_SBGC))
            score_sB = torch.einsum("bc,sbc->sb", q_SBHC[s, :, h], k_sBC) * scale
            weight_sB = score_sB.exp() / score_sB.exp().sum(dim=0)
            out_SBHC[s, :, h] = torch.einsum("sb,sbc->bc", weight_sB, v_sBC)
    return out_SBHC.reshape(length, batch, heads * width)


@pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa-3-per-group", "mqa"]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_causal_softmax_attention(heads: int, groups: int, scale: float | None):
    qkv = random_qkv(7, 2, heads, groups, 5)
    out = attention(softmax_scale=scale)(*qkv, None)
    torch.testing.assert_close(
        out, by_hand(*qkv, scale or 1 / math.sqrt(5)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.distributed
@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks_are_one_rank(cp: int):
    run_on_ranks(check_context_parallel, world_size=cp)


def check_context_parallel(world: World) -> None:
    qkv = random_qkv(16, 2, 6, 2, 4)
    upstream = random_qkv(16, 2, 6, 2, 4)[0].flatten(2).cos()
    whole = [x.clone().requires_grad_() for x in qkv]
    expected = attention()(*whole, None)
    expected.backward(upstream)

    own = zigzag_positions(16, world)
    parts = [x[own].clone().requires_grad_() for x in qkv]
    out = attention(dist.group.WORLD)(*parts, None)
    out.backward(upstream[own])

    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, expected[own], **exact)
    for name, part, full in zip("qkv", parts, whole, strict=True):
        torch.testing.assert_close(part.grad, full.grad[own], **exact, msg=lambda m, n=name: n + m)


LENGTHS = (5, 1, 7, 3)
PLACES = torch.tensor([i for length in LENGTHS for i in range(length)])


def test_documents_are_as_if_alone():
    """Compare two rows, split into documents at different positions, with each document alone."""
    qkv = random_qkv(16, 2, 6, 2, 4)
    offsets_BS = torch.stack([PLACES, torch.arange(16)])
    out = attention()(*qkv, offsets_BS)
    alone = [
        attention()(*(x[:, :1] for x in documents), None)
        for documents in zip(*(x.split(LENGTHS) for x in qkv), strict=True)
    ]
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out[:, :1], torch.cat(alone), **exact)
    whole = attention()(*(x[:, 1:] for x in qkv), None)
    torch.testing.assert_close(out[:, 1:], whole, **exact)


@pytest.mark.distributed
def test_documents_on_context_parallel_ranks_are_those_of_one_rank():
    run_on_ranks(check_documents, world_size=2)


def check_documents(world: World) -> None:
    qkv = random_qkv(16, 2, 6, 2, 4)
    offsets_BS = torch.stack([PLACES, torch.arange(16) % 6])
    expected = attention()(*qkv, offsets_BS)
    own = zigzag_positions(16, world)
    out = attention(dist.group.WORLD)(*(x[own] for x in qkv), offsets_BS[:, own])
    torch.testing.assert_close(out, expected[own], rtol=1e-12, atol=1e-12)


def zigzag_positions(length: int, world: World) -> list[int]:
    """Return the positions of a rank: rank r of cp holds chunks r and 2 cp - 1 - r."""
    size = length // (2 * world.size)
    last = 2 * world.size - 1 - world.rank
    return [
        *range(world.rank * size, (world.rank + 1) * size),
        *range(last * size, (last + 1) * size),
    ]
