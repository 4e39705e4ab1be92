"""What stands in for Megatron-Core's ways on a CPU, against Megatron-Core's."""

import torch
from megatron.core.transformer.moe import moe_utils

from megatron_moe.device import shortcuts


def test_a_rotation_is_megatrons():
    generator = torch.Generator().manual_seed(0)
    t_SBHC, out_grad = torch.randn(2, 6, 2, 3, 8, generator=generator, dtype=torch.float64)
    freqs_Sc = torch.rand(6, 4, generator=generator, dtype=torch.float64) * 9
    freqs_S11C = torch.cat([freqs_Sc, freqs_Sc], dim=-1)[:, None, None]
    results = []
    for rotate in (shortcuts.rotate, shortcuts._rotate_any_way):
        t = t_SBHC.clone().requires_grad_()
        out = rotate(t, freqs_S11C)
        results.append((out, *torch.autograd.grad(out, t, out_grad)))
    for mine, megatrons in zip(*results, strict=True):
        torch.testing.assert_close(mine, megatrons, rtol=1e-13, atol=1e-13)


def test_heads_that_are_rotated_in_part_go_megatrons_way():
    t_SBHC, freqs_S11C = torch.randn(6, 2, 3, 8), torch.rand(6, 1, 1, 4)
    expected = shortcuts._rotate_any_way(t_SBHC, freqs_S11C)
    assert torch.equal(shortcuts.rotate(t_SBHC, freqs_S11C), expected)
    assert torch.equal(shortcuts.rotate(t_SBHC, freqs_S11C)[..., 4:], t_SBHC[..., 4:])


def test_chunks_are_sorted_unless_they_are_in_order():
    tokens_TD, probs_T = torch.randn(6, 2), torch.rand(6)
    sizes = torch.tensor([1, 0, 3, 2])
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        found = shortcuts.sort_chunks(tokens_TD, sizes, torch.tensor(order), probs_T)
        wanted = moe_utils.sort_chunks_by_idxs(tokens_TD, sizes, torch.tensor(order), probs_T)
        for mine, megatrons in zip(found, wanted, strict=True):
            assert torch.equal(mine, megatrons)
