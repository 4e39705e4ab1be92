"""Tests of token permutation and its inverse, against Megatron-Core's functions.

Shape letters: T tokens, E experts, K experts of a token, D hidden_size.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from ranks import run_on_ranks
from tiny import save_dense
from torch import Tensor
from training_runs import tree, write_tokens

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime import permute
from megatron_moe.runtime.world import World

T, E, D = 13, 6, 8


def routing(topk: int) -> tuple[Tensor, Tensor]:
    """Return the experts that each token chose, ``(T, E)``, and its weights, zero for others."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(T, E, generator=generator, dtype=torch.float64)
    scores_TE[:, 2] = 0  # an expert that no token chooses
    map_TE = torch.zeros(T, E, dtype=torch.bool)
    map_TE.scatter_(1, scores_TE.topk(topk, dim=1).indices, True)
    return map_TE, scores_TE * map_TE


def there_and_back(
    module: Any, topk: int, dtype: torch.dtype, num_out_tokens: Any = None
) -> list[Tensor]:
    """Return the outputs of both functions and all gradients."""
    map_TE, probs_TE = routing(topk)
    generator = torch.Generator().manual_seed(1)
    x_TD, out_grad_TD = torch.randn(2, T, D, generator=generator, dtype=torch.float64).to(dtype)
    x_TD.requires_grad_()
    probs_TE.requires_grad_()
    rows = topk * T if num_out_tokens is None else num_out_tokens
    sorted_PD, prob_P, indices, offsets, _ = module.permute(
        x_TD, map_TE, probs=probs_TE, num_out_tokens=rows, fused=False, drop_and_pad=False
    )
    assert offsets is None
    weighted_PD = (sorted_PD * prob_P[:, None]).to(dtype)
    out_TD = module.unpermute(
        weighted_PD, indices, restore_shape=x_TD.shape, routing_map=map_TE, fused=False,
        drop_and_pad=False,
    )  # fmt: skip
    grads = torch.autograd.grad(out_TD, (x_TD, probs_TE), out_grad_TD)
    return [sorted_PD, prob_P, indices, out_TD, *grads]


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_there_and_back_is_megatrons(topk: int):
    actual, wanted = (there_and_back(m, topk, torch.float64) for m in (permute, moe_utils))
    for ours, megatrons in zip(actual[:3], wanted[:3], strict=True):
        assert torch.equal(ours, megatrons)
    for ours, megatrons in zip(actual[3:], wanted[3:], strict=True):  # sums in a different order
        torch.testing.assert_close(ours, megatrons, rtol=1e-14, atol=1e-14)


def test_sums_in_bf16_are_rounded_once():
    *_, out_TD, x_grad_TD, _ = there_and_back(permute, 5, torch.bfloat16)
    *_, exact_TD, exact_grad_TD, _ = there_and_back(permute, 5, torch.float64)
    assert out_TD.dtype == x_grad_TD.dtype == torch.bfloat16
    # Each added value differs from the exact one by at most one rounding, 2^-9.
    for ours, exact in ((out_TD, exact_TD), (x_grad_TD, exact_grad_TD)):
        scale = 5 * float(exact.detach().abs().max())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=scale * 2**-8)


@pytest.mark.parametrize("rows", [2 * T, T])
def test_a_number_of_rows_that_was_counted_goes_megatrons_way(rows: int):
    """If a limit may drop tokens, the dispatcher counts into a tensor, even if none are dropped."""
    counted = torch.tensor(rows)
    actual, wanted = (
        there_and_back(m, 2, torch.float64, num_out_tokens=counted) for m in (permute, moe_utils)
    )
    for ours, megatrons in zip(actual, wanted, strict=True):
        assert torch.equal(ours, megatrons)
    assert not hasattr(actual[2], "rows_TK")


def test_padding_to_a_capacity_goes_megatrons_way():
    map_TE, probs_TE = routing(2)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    options = {"probs": probs_TE, "num_out_tokens": 4 * E, "drop_and_pad": True}
    actual, wanted = (m.permute(x_TD, map_TE, **options) for m in (permute, moe_utils))
    assert torch.equal(actual[0], wanted[0])
    assert not hasattr(actual[2], "rows_TK")


@pytest.mark.parametrize(
    ("ep", "etp", "rows", "copied"),
    [(1, 1, 8, False), (2, 1, 8, True), (1, 2, 8, True), (1, 1, torch.tensor(8), True)],
    ids=["alone", "ep2", "etp2", "rows-counted"],
)
def test_counts_stay_on_the_device_if_the_host_needs_none(
    ep: int, etp: int, rows: object, copied: bool
):
    points = []

    def copy_to_host(self: Any, point: str, counts: Tensor | None = None) -> str:
        points.append(point)
        return "copied"

    dispatcher = SimpleNamespace(ep_size=ep, tp_size=etp, num_out_tokens=rows)
    counts = torch.tensor([5, 3])
    result = permute._unless_alone(copy_to_host)(dispatcher, "before_finish", counts)
    assert points == (["before_finish"] if copied else [])
    assert result == "copied" if copied else result is counts


@pytest.mark.slow
def test_a_compiled_sum_of_rows_is_the_eager_one():
    x_PD = torch.randn(2 * T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, rows_TK = permute.routes(routing(2)[0], 2)
    actual = torch.compile(permute.sum_of_rows.__wrapped__)(x_PD, rows_TK)
    assert torch.equal(actual, permute.sum_of_rows(x_PD, rows_TK))


@pytest.mark.distributed
@pytest.mark.parametrize("ep", [1, 2])
def test_a_model_computes_the_same_with_them(tmp_path: Path, ep: int):
    dense = save_dense(tmp_path / "dense")
    config = build(
        RunConfig,
        tree(
            tmp_path / "run",
            dense,
            write_tokens(tmp_path / "tokens"),
            moe={"num_moe_experts": 4, "moe_router_topk": 2},
            parallel={"expert_parallel_size": ep},
            train={"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        ),
    )
    run_on_ranks(compare, config, world_size=ep)


def compare(world: World, config: RunConfig) -> None:
    from megatron_moe.bench.build import make_supply, make_timed_state
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.guard import StepGuard
    from megatron_moe.train.step import train_step

    layout, groups = create_groups(config.parallel, seed=0)
    results = []
    for installed in (False, True):
        if installed:
            permute.install()
        state = make_timed_state(config, world, layout, groups, random=True, balanced=False)
        batches = make_supply(config, state.model.spec, groups, random=True)(state)
        result = train_step(
            state, batches, config, groups, guard=StepGuard(config.guard), at=lambda _: None
        )
        results.append((result.lm_loss, result.grad_norm))
    for ours, megatrons in zip(*results, strict=True):
        assert ours == pytest.approx(megatrons, rel=1e-5)  # fp32 sums in a different order
