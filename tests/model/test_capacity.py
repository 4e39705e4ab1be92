"""Tests of dropped choices: by hand, against Megatron-Core, and over ranks.

Shape letters: T tokens, E experts, K moe_router_topk.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.config.moe import Moe
from megatron_moe.model.capacity import Capacity, capacity_of, kept_choices, kept_over_ranks, padded
from megatron_moe.runtime.world import World

# Tokens 0 to 5 choose expert 0 with these weights; tokens 0 and 5 also choose expert 1.
PROBS_TE = torch.tensor(
    [[0.3, 0.7], [0.9, 0.0], [0.5, 0.0], [0.9, 0.0], [0.1, 0.0], [0.6, 0.4]]
)  # fmt: skip
CHOSEN_TE = PROBS_TE > 0


@pytest.mark.parametrize(
    ("policy", "limit", "expert_0", "expert_1"),
    [
        ("position", 2, [0, 1], [0, 5]),
        ("position", 1, [0], [0]),
        ("probs", 2, [1, 3], [0, 5]),
        ("probs", 1, [1], [0]),  # 1 and 3 are tied: the first is kept
        ("probs", 3, [1, 3, 5], [0, 5]),
        ("probs", 6, [0, 1, 2, 3, 4, 5], [0, 5]),
        ("position", 9, [0, 1, 2, 3, 4, 5], [0, 5]),
    ],
)
def test_who_stays(policy: str, limit: int, expert_0: list[int], expert_1: list[int]):
    kept_TE = kept_choices(PROBS_TE, CHOSEN_TE, limit, policy=policy)
    assert kept_TE[:, 0].nonzero().flatten().tolist() == expert_0
    assert kept_TE[:, 1].nonzero().flatten().tolist() == expert_1


def random_choices(tokens: int, experts: int, topk: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator)
    values, chosen = logits_TE.topk(topk)
    probs_TE = torch.zeros_like(logits_TE).scatter(1, chosen, values.softmax(dim=-1))
    return probs_TE, probs_TE > 0


@settings(max_examples=60)
@given(st.integers(4, 64), st.sampled_from([2, 4, 8]), st.integers(1, 2), st.integers(0, 99),
       st.sampled_from([0.25, 0.5, 1.0, 1.5]))  # fmt: skip
def test_by_weight_we_keep_what_megatron_keeps(tokens, experts, topk, seed, factor):
    if topk == 1:
        topk = 2  # one choice always has weight 1: all tie, and Megatron's order is undefined
    probs_TE, chosen_TE = random_choices(tokens, experts, topk, seed)
    capacity = Capacity(factor, "probs", "rank", False)
    limit = capacity.tokens(tokens, num_experts=experts, topk=topk)
    expected_probs_TE, expected_TE = apply_router_token_dropping(
        probs_TE, chosen_TE, topk, factor, drop_policy="probs"
    )
    kept_TE = kept_choices(probs_TE, chosen_TE, limit, policy="probs")
    assert torch.equal(kept_TE, expected_TE)
    assert torch.equal(probs_TE * kept_TE, expected_probs_TE)


@settings(max_examples=60)
@given(st.integers(1, 200), st.sampled_from([2, 4, 8, 64]), st.integers(1, 8),
       st.sampled_from([0.5, 1.0, 1.25, 2.0, 4.0]))  # fmt: skip
def test_both_formulas_are_as_they_are_written(tokens, experts, topk, factor):
    for formula, counted in (("megatron", tokens * topk), ("tokens_per_expert", tokens)):
        moe = Moe(num_moe_experts=experts, moe_router_topk=topk,
                  moe_expert_capacity_factor=factor, capacity_formula=formula)  # fmt: skip
        capacity = capacity_of(moe)
        assert capacity is not None
        limit = capacity.tokens(tokens, num_experts=experts, topk=topk)
        # Quarters and powers of two: the fraction is exact, so its ceiling must be exact.
        assert limit == math.ceil(Fraction(counted, experts) * Fraction(factor))


def test_padding_fills_every_expert_and_keeps_who_stays():
    kept_TE = kept_choices(PROBS_TE, CHOSEN_TE, 3, policy="probs")
    filled_TE = padded(kept_TE, 3)
    assert filled_TE.sum(dim=0).tolist() == [3, 3]
    assert (filled_TE | ~kept_TE).all()


@pytest.mark.distributed
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropping_over_ranks_is_dropping_on_one(policy: str):
    run_on_ranks(check_over_ranks, policy, world_size=4)


def check_over_ranks(world: World, policy: str) -> None:
    import torch.distributed as dist

    probs_TE, chosen_TE = random_choices(64, 4, 2, seed=3)
    expected_TE = kept_choices(probs_TE, chosen_TE, 20, policy=policy)
    assert 0 < expected_TE.sum() < chosen_TE.sum(), "some are dropped, or nothing is tested"
    index_T = torch.randperm(64, generator=torch.Generator().manual_seed(1)).chunk(4)[world.rank]
    group = dist.group.WORLD
    assert group is not None
    kept_TE = kept_over_ranks(
        probs_TE[index_T], chosen_TE[index_T], index_T, 20, policy=policy, group=group
    )
    assert torch.equal(kept_TE, expected_TE[index_T])
