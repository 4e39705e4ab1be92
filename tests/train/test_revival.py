"""Which experts are re-created, and where the logits of a re-created one lie."""

import pytest
import torch

from megatron_moe.config.moe import Moe
from megatron_moe.train.revival import Revival, due_revivals, unused_after

LAYERS = (3, 5)
HEALTHY = [10, 12, 9, 9]


def settings(**changes: float) -> Moe:
    return Moe.model_validate({"num_moe_experts": 4, "revive_after_steps": 2} | changes)


def revived(moe: Moe, *steps: list[list[int]]) -> dict[int, list[tuple[int, int, int, float]]]:
    """Layer, expert, sibling and share of the sibling's row, by step."""
    unused, result = {layer: [0] * len(HEALTHY) for layer in LAYERS}, {}
    for step, counts in enumerate(steps, 1):
        chosen_LE = torch.tensor(counts, dtype=torch.float64)
        unused = unused_after(unused, chosen_LE, moe)
        due = due_revivals(unused, chosen_LE, moe)
        result |= {step: [(r.layer, r.expert, r.sibling, r.share) for r in due]} if due else {}
    return result


def test_a_dead_expert_is_copied_from_the_busiest_and_closer_each_time():
    dead = [20, 0, 30, 10]
    assert revived(settings(), *[[HEALTHY, dead]] * 5) == {
        2: [(5, 1, 2, 0.5)],
        4: [(5, 1, 2, 0.75)],
    }


def test_an_expert_that_recovers_counts_from_zero():
    dead, alive = [20, 0, 10, 10], [20, 1, 10, 10]
    assert revived(settings(), *[[HEALTHY, dead]] * 3, [HEALTHY, alive], [HEALTHY, dead]) == {
        2: [(5, 1, 0, 0.5)]
    }
    assert revived(settings(), [HEALTHY, dead], [HEALTHY, alive], [HEALTHY, dead]) == {}


def test_almost_no_tokens_is_a_share_of_the_mean():
    """A mean of 100: two tokens are 0.02 of it."""
    counts = [200, 2, 100, 98]
    assert revived(settings(revive_below_load=0.01), *[[HEALTHY, counts]] * 2) == {}
    assert revived(settings(revive_below_load=0.02), *[[counts, HEALTHY]] * 2) == {
        2: [(3, 1, 0, 0.5)]
    }


def test_experts_of_a_layer_get_different_siblings_and_wait_if_there_are_too_few():
    assert revived(settings(), *[[[0, 30, 0, 10], [0, 0, 0, 40]]] * 2) == {
        2: [(3, 0, 1, 0.5), (3, 2, 3, 0.5), (5, 0, 3, 0.5)]
    }


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_revived_expert_only_takes_the_last_place_of_tokens_that_its_sibling_has(attempt: int):
    """Whatever vector is added to all rows; tokens whose K-th logit is below the mean are rare."""
    topk, dead, sibling = 2, 5, 3
    generator = torch.Generator().manual_seed(0)
    rows_ED = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    x_TD = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    for shift in (0.0, -5.0):
        logits_TE = x_TD @ (rows_ED + shift).T
        logits_TE[:, dead] = -torch.inf  # no token chooses it
        kth_T = logits_TE.topk(topk).values[:, -1]
        row_D = Revival(0, dead, sibling, attempt, attempt).row(rows_ED + shift)
        new_T = x_TD @ row_D
        above_mean_T = kth_T > (x_TD @ (rows_ED + shift).T).mean(dim=1)
        enters_T = (new_T > kth_T) & above_mean_T
        assert above_mean_T.double().mean() > 0.95
        assert 0.02 < enters_T.double().mean() < 0.25
        sibling_T = logits_TE[:, sibling]
        assert (sibling_T[enters_T] > new_T[enters_T]).all()
        assert (sibling_T[enters_T] >= kth_T[enters_T]).all()
