"""The adaptive coefficients against the recursion of arXiv 2406.06563, written by hand."""

import pytest
import torch

from megatron_moe.config.moe import Moe
from megatron_moe.train.balancing import adapted, drop_rates


def settings(**moe: float | bool | None) -> Moe:
    return Moe.model_validate({"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01} | moe)


def test_without_a_capacity_the_rate_is_that_of_a_capacity_of_the_mean():
    chosen_LE = torch.tensor([[10.0, 10.0, 10.0, 10.0], [25.0, 11.0, 4.0, 0.0], [40.0, 0, 0, 0]])
    rate_L = drop_rates(chosen_LE, torch.full((3,), 40.0), capacity=False)
    assert rate_L.tolist() == pytest.approx([0, (15 + 1) / 40, 30 / 40])


def test_with_a_capacity_the_rate_is_what_was_dropped():
    chosen_LE = torch.full((2, 4), 10.0)
    assert drop_rates(chosen_LE, torch.tensor([40.0, 30.0]), capacity=True).tolist() == [0, 0.25]


def test_the_coefficients_follow_the_recursion():
    moe = settings(moe_expert_capacity_factor=1.0, aux_loss_sensitivity=0.1, aux_loss_decay=0.9)
    current = {2: 0.01, 5: 0.004}
    expected = dict(current)
    for dropped in ((0.05, 0.5), (0.0, 0.02), (0.3, 0.0)):
        chosen_LE = torch.full((2, 4), 25.0, dtype=torch.float64)
        kept_L = torch.tensor([100 * (1 - share) for share in dropped], dtype=torch.float64)
        current = adapted(current, chosen_LE, kept_L, moe)
        for layer, share in zip((2, 5), dropped, strict=True):
            expected[layer] = 0.9 * expected[layer] + 0.1 * min(0.1 * share, 0.01)
        assert current == pytest.approx(expected, rel=1e-12)


def test_a_balanced_layer_loses_its_loss_and_a_collapsed_one_keeps_the_bound():
    moe = settings()
    current = {0: 0.01, 1: 0.01}
    chosen_LE = torch.tensor([[10.0, 10, 10, 10], [40, 0, 0, 0]])
    for _ in range(1000):
        current = adapted(current, chosen_LE, torch.full((2,), 40.0), moe)
    assert current[0] == pytest.approx(0.01 * 0.99**1000)
    assert current[1] == pytest.approx(0.01)
