"""Tests of the noisy gate: its noise is normal and independent of the layout, its loss correct.

Shape letters: T tokens, E experts, K moe_router_topk.
"""

import math

import pytest
import torch

from megatron_moe.model.noise import normal_numbers
from megatron_moe.model.noisy_router import NoisyRouter, squared_variation


def numbers(samples: list[int], positions: list[int], *, seed: int = 0, layer: int = 0):
    return normal_numbers(
        seed=seed, layer=layer, samples_B=torch.tensor(samples),
        positions_s=torch.tensor(positions), num_experts=8,
    )  # fmt: skip


def test_noise_is_standard_normal():
    x = numbers(list(range(64)), list(range(256))).double().flatten()
    error = 5 / math.sqrt(len(x))  # five standard errors
    assert x.mean().abs() < error
    assert (x.var() - 1).abs() < 2 * error
    for bound in (-2.0, -1.0, 0.0, 1.0, 2.0):
        expected = torch.special.ndtr(torch.tensor(bound, dtype=torch.float64))
        assert ((x < bound).double().mean() - expected).abs() < error
    neighbours = x[:-1] * x[1:]
    assert neighbours.mean().abs() < error


def test_noise_depends_on_the_token_and_not_on_the_rank():
    whole = numbers([5, 6, 7, 8], [0, 1, 2, 3])
    part = numbers([7], [3, 1])
    assert torch.equal(part[:, 0], whole[[3, 1], 2])
    assert not torch.equal(whole, numbers([5, 6, 7, 8], [0, 1, 2, 3], layer=1))
    assert not torch.equal(whole, numbers([5, 6, 7, 8], [0, 1, 2, 3], seed=1))
    assert len(whole.unique()) == whole.numel()


def test_expected_load_is_how_often_fresh_noise_chooses_the_expert():
    """Compare with 20,000 draws of one expert's noise while the others' noise is fixed."""
    router = NoisyRouter.__new__(NoisyRouter)
    torch.nn.Module.__init__(router)
    router.topk = 2
    generator = torch.Generator().manual_seed(0)
    clean_TE = torch.randn(3, 5, generator=generator)
    std_TE = torch.rand(3, 5, generator=generator) + 0.5
    noisy_TE = clean_TE + std_TE * torch.randn(3, 5, generator=generator)
    router._clean_TE, router._std_TE = clean_TE, std_TE
    load_E = router._expected_load(noisy_TE)
    draws, expected_E = 20_000, torch.zeros(5)
    for expert in range(5):
        again = noisy_TE.expand(draws, 3, 5).clone()
        again[..., expert] = clean_TE[:, expert] + std_TE[:, expert] * torch.randn(
            draws, 3, generator=generator
        )
        chosen = (again.topk(2, dim=-1).indices == expert).any(dim=-1)
        expected_E[expert] = chosen.float().mean(dim=0).sum()
    # The error of a mean of 20,000 draws, three tokens: below 5 * sqrt(3 * 0.25 / 20000) = 0.031.
    torch.testing.assert_close(load_E, expected_E, atol=0.031, rtol=0)


def test_squared_variation():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    assert squared_variation(values).tolist() == pytest.approx([0.0, 4.0])
