"""Tests of the replacements of Megatron-Core's functions, against those functions."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

from megatron_moe.runtime import shortcuts


def test_a_rotation_is_megatrons():
    generator = torch.Generator().manual_seed(0)
    t_SBHC, out_grad = torch.randn(2, 6, 2, 3, 8, generator=generator, dtype=torch.float64)
    freqs_Sc = torch.rand(6, 4, generator=generator, dtype=torch.float64) * 9
    freqs_S11C = torch.cat([freqs_Sc, freqs_Sc], dim=-1)[:, None, None]
    results = []
    for rotate in (shortcuts.rotate, shortcuts._megatron_rotate):
        t = t_SBHC.clone().requires_grad_()
        out = rotate(t, freqs_S11C)
        results.append((out, *torch.autograd.grad(out, t, out_grad)))
    for ours, megatrons in zip(*results, strict=True):
        torch.testing.assert_close(ours, megatrons, rtol=1e-13, atol=1e-13)


def test_attention_rotates_the_short_way():
    config = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=3)
    t_SBHC = torch.randn(6, 2, 3, 8, requires_grad=True)
    out = apply_rotary_pos_emb(t_SBHC, torch.rand(6, 1, 1, 8), config, cp_group=object())
    assert type(out.grad_fn).__name__ == "_RotationBackward"


def test_heads_that_are_rotated_in_part_go_megatrons_way():
    t_SBHC, freqs_S11C = torch.randn(6, 2, 3, 8), torch.rand(6, 1, 1, 4)
    expected = shortcuts._megatron_rotate(t_SBHC, freqs_S11C)
    assert torch.equal(shortcuts.rotate(t_SBHC, freqs_S11C), expected)
    assert torch.equal(shortcuts.rotate(t_SBHC, freqs_S11C)[..., 4:], t_SBHC[..., 4:])


def test_chunks_are_sorted_unless_they_are_in_order():
    tokens_TD, probs_T = torch.randn(6, 2), torch.rand(6)
    sizes = torch.tensor([1, 0, 3, 2])
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        actual = shortcuts.sort_chunks(tokens_TD, sizes, torch.tensor(order), probs_T)
        wanted = moe_utils.sort_chunks_by_idxs(tokens_TD, sizes, torch.tensor(order), probs_T)
        for ours, megatrons in zip(actual, wanted, strict=True):
            assert torch.equal(ours, megatrons)


def test_norm_of_gradients_long_and_short():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator) for size in (3, 2**20 + 5, 4096)]
    squares = sum(float(grad.double().square().sum()) for grad in grads)
    wanted = math.sqrt(squares)
    ours = shortcuts.l2_norm(0, None, [grads], False)[0]
    assert float(ours) == pytest.approx(
        wanted, rel=1e-6
    )  # rounded to fp32 after a float64 sum of squares
    cudas = shortcuts.norm_of_norms(grads)
    assert (cudas.shape, cudas.dtype) == (ours.shape, ours.dtype) == ((1,), torch.float32)
    assert float(cudas) == pytest.approx(
        wanted, rel=1e-4
    )  # its CPU kernel sums a million values in fp32


@pytest.mark.slow
def test_a_compiled_rotation_is_the_eager_one():
    generator = torch.Generator().manual_seed(0)
    t_SBHC = torch.randn(6, 2, 3, 8, generator=generator)
    angle_S11C = torch.rand(6, 1, 1, 8, generator=generator)
    rotated = shortcuts._rotated.__wrapped__
    arguments = t_SBHC, angle_S11C.cos(), angle_S11C.sin()
    # fp32; the compiler may fuse a product and a sum without rounding in between.
    torch.testing.assert_close(
        torch.compile(rotated)(*arguments), rotated(*arguments), rtol=1e-6, atol=1e-6
    )


def test_megatron_takes_the_norm_here():
    assert get_grad_norm_fp32.__globals__["l2_norm_impl"] is shortcuts.l2_norm
