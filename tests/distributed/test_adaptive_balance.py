"""Adaptive coefficients: layouts equal one rank, and a resumed run an uninterrupted one.

Coefficients are functions of counts of tokens, so they are equal as long as all ranks route alike:
1e-9 relative, which one token that is routed otherwise would exceed. Losses as in
test_invariance.py.
"""

from typing import Any

import pytest
from training_runs import Runs, make_runs

from megatron_moe.checkpoint.folder import newest, read_progress

pytestmark = pytest.mark.distributed
COEFFICIENTS = "router/aux_loss_coeff_by_layer"
ADAPTIVE = {
    "moe_aux_loss_coeff": 0.1, "adaptive_aux_loss": True,
    "aux_loss_sensitivity": 0.3, "aux_loss_decay": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    common = {"moe": {"moe_layers": [0, 2, 3], **ADAPTIVE}, "checkpoint": {"interval": 2}}
    return make_runs(tmp_path_factory.mktemp("adaptive"), common=common)


@pytest.fixture(scope="module")
def one_rank(runs: Runs) -> list[dict[str, Any]]:
    return runs.train("one")


def same(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(lines[1:], expected[1:], strict=True):
        assert ours[COEFFICIENTS] == pytest.approx(theirs[COEFFICIENTS], rel=1e-9)
        assert ours["loss/lm"] == pytest.approx(theirs["loss/lm"], rel=1e-5)


def test_coefficients_adapt_by_layer_and_are_saved(runs: Runs, one_rank: list[dict[str, Any]]):
    assert one_rank[1][COEFFICIENTS] == [0.1] * 3
    assert len({value for line in one_rank[2:] for value in line[COEFFICIENTS]}) == 3 * 4
    load_LE = one_rank[1]["router/load_by_expert"]
    rate_L = [sum(max(0, x - 1) for x in load_E) / len(load_E) for load_E in load_LE]
    expected = [0.5 * 0.1 + 0.5 * min(0.1, 0.3 * rate) for rate in rate_L]
    assert one_rank[2][COEFFICIENTS] == pytest.approx(expected, abs=1e-3)  # loads have 3 digits
    checkpoint = newest(runs.root / "one")
    assert checkpoint is not None
    assert list(read_progress(checkpoint).balance or ()) == ["0", "2", "3"]


@pytest.mark.parametrize(
    "layout", ["tp2 ep2", "pp2 dp2 ep2", pytest.param("cp2 etp2", marks=pytest.mark.slow)]
)
def test_a_layout_adapts_as_one_rank(runs: Runs, one_rank: list[dict[str, Any]], layout: str):
    same(runs.train(layout.replace(" ", "-"), layout), one_rank)


@pytest.mark.parametrize("later", ["1", "tp2 ep2"])
def test_a_resumed_run_continues_with_the_saved_coefficients(
    runs: Runs, one_rank: list[dict[str, Any]], later: str
):
    where = f"resumed-{later}"
    runs.train(where, train={"steps": 2}, optimizer={"lr_decay_steps": 5})
    same(runs.train(where, later), one_rank)


def test_coefficients_at_their_bound_change_no_bit(runs: Runs):
    """A sensitivity beyond all rates keeps the bound, which is the constant coefficient."""
    bound = runs.train("bound", moe={"aux_loss_sensitivity": 1e6})
    constant = runs.train("constant", moe={
        "adaptive_aux_loss": False, "aux_loss_sensitivity": 0.2, "aux_loss_decay": 0.99,
    })  # fmt: skip
    for ours, theirs in zip(bound[1:], constant[1:], strict=True):
        assert ours[COEFFICIENTS] == [0.1] * 3
        assert COEFFICIENTS not in theirs
        assert [ours[key] for key in ("loss/lm", "grad_norm")] == [
            theirs[key] for key in ("loss/lm", "grad_norm")
        ]


def test_the_coefficients_reach_the_gradients(runs: Runs, one_rank: list[dict[str, Any]]):
    constant = runs.train("other", moe={"aux_loss_sensitivity": 1e6})
    assert constant[1]["grad_norm"] == one_rank[1]["grad_norm"]
    assert constant[2]["grad_norm"] != one_rank[2]["grad_norm"]


def test_the_noisy_gates_own_loss_adapts(runs: Runs):
    noisy = {"router_gate": "noisy_linear", "moe_router_load_balancing_type": "cv_squared"}
    adaptive = runs.train("noisy", moe=noisy)
    bound = runs.train("noisy-bound", moe=noisy | {"aux_loss_sensitivity": 1e6})
    assert adaptive[1]["grad_norm"] == bound[1]["grad_norm"]
    assert adaptive[2]["grad_norm"] != bound[2]["grad_norm"]
