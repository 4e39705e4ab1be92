"""Tests of FlexAttention's masks against the CPU's dense masks, pair by pair and by block.

Shape letters: S sequence, s queries of a cp rank, B batch, H heads, G KV groups, C head width.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from megatron_moe.model import block_mask as masks
from megatron_moe.model.attention import causal_mask, document_mask
from megatron_moe.model.block_mask import BLOCK, causal_blocks, document_blocks, positions
from megatron_moe.runtime.world import World

CPU = torch.device("cpu")
RANKS = [
    pytest.param(cp, rank, id=f"cp{cp}-rank{rank}") for cp in (1, 2, 4) for rank in {0, 1, cp - 1}
    if rank < cp
]  # fmt: skip
LENGTHS = [512, 1000, 2048]  # 1000 has a partial block, as do the chunks of a cp rank


def places(*documents: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in documents])


def documents(length: int) -> Tensor:
    """Return two rows: one of short and long documents, and one of a single document."""
    lengths = [3, 1, BLOCK - 4, 200, 2 * BLOCK + 7]
    packed = places(*lengths, length)[:length]
    return torch.stack([packed, torch.arange(length)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("cp", "rank"), RANKS)
def test_causal_blocks_are_the_dense_mask(length: int, cp: int, rank: int):
    dense_sS = causal_mask(length, cp, rank)
    check(causal_blocks(length, cp, rank, CPU), dense_sS[None, None], exact=True)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("cp", "rank"), RANKS)
def test_document_blocks_are_the_dense_mask(length: int, cp: int, rank: int):
    mine_s = positions(length, cp, rank)
    offset_Bs = documents(length)[:, mine_s]
    dense_B1sS = document_mask(offset_Bs, mine_s, length=length)
    check(document_blocks(offset_Bs, length=length, cp=cp, rank=rank), dense_B1sS, exact=False)


def check(mask: flex.BlockMask, dense_B1sS: Tensor, *, exact: bool) -> None:
    batch, _, queries, keys = dense_B1sS.shape
    assert mask.seq_lengths == (queries, keys)
    pairs = flex.create_mask(mask.mask_mod, batch, 1, queries, keys, device="cpu")
    assert torch.equal(pairs, dense_B1sS)
    padded = F.pad(dense_B1sS, (0, -keys % BLOCK, 0, -queries % BLOCK))
    blocks = padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    some, read = blocks.any(5).any(3), mask.to_dense().bool()
    assert not (some & ~read).any(), "a block that holds something to see is left out"
    if exact:
        assert torch.equal(some, read)
    # Rows beyond the last query are not read, so a full block may extend past it.
    full = F.pad(dense_B1sS, (0, -keys % BLOCK)).unflatten(3, (-1, BLOCK)).all(4)
    rows = torch.stack([part.all(2) for part in full.split(BLOCK, dim=2)], dim=2)
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks, rows.sum(-1).to(torch.int32))


def test_blocks_are_those_torch_finds_in_the_whole_mask():
    """Compare numbers and indices of partial and full blocks, by query and by key."""
    position_s = positions(1024, 2, 1)
    ours = causal_blocks(1024, 2, 1, CPU)
    torchs = flex.create_block_mask(
        ours.mask_mod, 1, None, len(position_s), 1024, device="cpu", BLOCK_SIZE=BLOCK
    )
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in (f"{name}_num_blocks", f"{name}_indices"):
            assert torch.equal(getattr(ours, part), getattr(torchs, part)), part


@pytest.mark.distributed
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)], ids=["mha", "gqa"])
def test_attention_by_blocks_is_attention_by_the_dense_mask(packed: bool, heads: int, groups: int):
    """Run in a separate process: FlexAttention's backward starts threads that break forks."""
    run_on_ranks(check_attention, packed, heads, groups, world_size=1)


def check_attention(world: World, packed: bool, heads: int, groups: int) -> None:
    """Compare values and gradients. torch has an eager CPU backward but refuses to run it."""
    flex._validate_device = lambda *_: None
    length, cp, rank = 512, 2, 1
    mine_s = positions(length, cp, rank)
    if packed:
        offset_Bs = documents(length)[:, mine_s]
        mask = document_blocks(offset_Bs, length=length, cp=cp, rank=rank)
        dense = document_mask(offset_Bs, mine_s, length=length)
    else:
        mask, dense = causal_blocks(length, cp, rank, CPU), causal_mask(length, cp, rank)
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, len(mine_s)), (groups, length), (groups, length))
    qkv = [
        torch.randn(2, n, s, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for n, s in shapes
    ]
    out_grad = torch.randn(2, heads, len(mine_s), 16, generator=generator, dtype=torch.float64)
    results = []
    for out in (
        flex.flex_attention(*qkv, block_mask=mask, scale=0.3, enable_gqa=True),
        F.scaled_dot_product_attention(*qkv, attn_mask=dense, scale=0.3, enable_gqa=True),
    ):
        assert isinstance(out, Tensor)
        results.append((out, *torch.autograd.grad(out, qkv, out_grad)))
    for actual, wanted in zip(*results, strict=True):  # both float64, summed in a different order
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_a_document_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch):
    made = []
    make = masks._block_mask
    monkeypatch.setattr(masks, "_block_mask", lambda *a, **k: made.append(1) or make(*a, **k))
    offset_Bs = documents(256)
    shape = {"length": 256, "cp": 1, "rank": 0}
    first = document_blocks(offset_Bs, **shape)
    assert document_blocks(offset_Bs, **shape) is first
    assert document_blocks(offset_Bs.detach(), **shape) is first, "a recomputed layer"
    assert len(made) == 1
    assert document_blocks(offset_Bs.clone(), **shape) is not first
    offset_Bs[0, 0] = 0  # a change in place, which callers must not make, is detected
    assert document_blocks(offset_Bs, **shape) is not first


@pytest.mark.slow
@pytest.mark.distributed
def test_new_documents_do_not_compile_attention_again():
    """Run in a separate process because of the compiler's threads. A CPU compiles the forward."""
    run_on_ranks(check_compiled, world_size=1)


def check_compiled(world: World) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.flex_attention, dynamic=False, backend=counter)
    generator = torch.Generator().manual_seed(0)
    mine_s = positions(512, 2, 1)
    query = torch.randn(2, 6, len(mine_s), 16, generator=generator)
    key, value = torch.randn(2, 2, 2, 512, 16, generator=generator)
    for lengths in ((100, 30, 382), (512,), (1, 200, 311)):
        offset_Bs = places(*lengths)[mine_s].expand(2, -1).contiguous()
        mask = document_blocks(offset_Bs, length=512, cp=2, rank=1)
        actual = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        dense = document_mask(offset_Bs, mine_s, length=512)
        wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)  # fp32
    assert counter.frame_count == 1
