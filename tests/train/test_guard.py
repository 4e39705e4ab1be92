"""Tests of skipped steps, roll-backs and stuck ranks: pure decisions, then whole runs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import newest
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.config.run import Guard
from megatron_moe.errors import JobError
from megatron_moe.train import step as step_module
from megatron_moe.train.guard import SPIKE_WINDOW, StepGuard
from megatron_moe.train.verdict import Report, died, hung, silent


def decisions(guard: StepGuard, losses: list[float], grad_norm: float = 1.0) -> list[str]:
    return [guard(step=i, loss=x, grad_norm=grad_norm) for i, x in enumerate(losses, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_up_to_the_limit_in_a_row(bad: float):
    guard = StepGuard(Guard(max_skipped_steps=2))
    assert decisions(guard, [1.0, bad, bad, 1.0, bad, bad]) == [
        "keep", "skip", "skip", "keep", "skip", "skip",
    ]  # fmt: skip
    with pytest.raises(JobError, match=r"3 consecutive steps \(5 to 7\) had a non-fin") as caught:
        guard(step=7, loss=1.0, grad_norm=bad)
    assert "\n  check the data of these steps" in str(caught.value)


def test_a_spike_needs_a_history_a_factor_and_is_no_part_of_the_history():
    flat = [2.0] * SPIKE_WINDOW
    assert decisions(StepGuard(Guard()), [*flat, 9.0])[-1] == "keep"
    assert decisions(StepGuard(Guard(spike_factor=2.0)), [*flat[1:], 9.0])[-1] == "keep"
    assert decisions(StepGuard(Guard(spike_factor=2.0)), [*flat, 4.0])[-1] == "keep"
    guard = StepGuard(Guard(spike_factor=2.0, max_skipped_steps=1))
    assert decisions(guard, [*flat, 4.1, *flat])[SPIKE_WINDOW] == "roll back"
    with pytest.raises(JobError, match=r"spiked again after 1 roll-backs"):
        guard(step=99, loss=4.1, grad_norm=1.0)


def test_the_rank_that_is_furthest_behind_and_does_not_wait_is_to_blame():
    waiting = Report(rank=0, step=7, stage="forward", where="a.py:1 in f", waiting=True)
    behind = Report(rank=2, step=7, stage="data", where="b.py:2 in g")
    reports = {0: waiting, 1: replace(waiting, rank=1), 2: behind}
    assert hung(reports, 30) == (
        "no rank has made progress for 30 s: rank 2 is stuck in the data stage of step 7 "
        "at b.py:2 in g"
    )
    reports[2] = replace(waiting, rank=2, where="c.py:3 in h", waiting=False)
    assert hung(reports, 30).endswith(
        ": rank 2 is stuck in the forward stage of step 7 at c.py:3 in h"
    )
    assert died(behind).startswith("rank 2 died in the data stage of step 7: ")


def test_messages_name_the_host_if_there_are_several():
    report = Report(rank=2, step=7, stage="data", where="b.py:2 in g", host="node1")
    for message in (died(report), silent(report, 30), hung({2: report}, 30)):
        assert "rank 2 on node1 " in message
    assert silent(report, 30).endswith(" or node1 is unreachable")
    assert silent(replace(report, host=""), 30).endswith(" or its machine is unreachable")


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return tree(
        tmp_path / "run", save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens"),
        train={"steps": 6}, checkpoint={"interval": 2}, parallel={"expert_parallel_size": 2},
        guard={"max_skipped_steps": 1},
    )  # fmt: skip


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Make the loss of rank 0 NaN in these calls; a step of two micro-batches makes two calls."""
    loss, seen = step_module._loss, []

    def poisoned(mask, losses):
        total, tokens, report = loss(mask, losses)
        seen.append(1)
        if len(seen) in calls and torch.distributed.get_rank() == 0:
            return total * math.nan, tokens, report * math.nan
        return total, tokens, report

    monkeypatch.setattr(step_module, "_loss", poisoned)


@pytest.mark.distributed
def test_a_poisoned_step_changes_nothing_and_the_run_continues(
    settings: dict, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, 5)
    lines = run_training(settings, world_size=2)
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["skipped"] for line in lines[1:]] == [0, 0, 1, 0, 0, 0]
    assert lines[3]["loss/lm"] is None
    assert all(math.isfinite(line["loss/lm"]) for line in lines[4:])


@pytest.mark.distributed
def test_a_poisoned_step_does_not_move_the_routers_biases(
    settings: dict, monkeypatch: pytest.MonkeyPatch
):
    """Five steps, one of them skipped, move each bias by the rate an even number of times."""
    poison(monkeypatch, 5)
    settings["moe"] |= {
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none", "moe_router_bias_update_rate": 1.0,
    }  # fmt: skip
    settings["train"]["steps"] = 5
    run_training(settings, world_size=2)
    checkpoint = newest(Path(settings["run"]["dir"]))
    assert checkpoint is not None
    with GlobalTensors(checkpoint) as tensors:
        biases = [name for name in tensors.names if name.endswith("expert_bias")]
        moves_LE = torch.stack([tensors.read(n, index=None, dtype=torch.float32) for n in biases])
    assert moves_LE.any()
    # A load of exactly the mean moves no bias: allow that in one step of a few experts.
    assert (moves_LE.abs() <= 4).all()
    assert ((moves_LE % 2) == 0).double().mean() > 0.8


@pytest.mark.distributed
def test_one_poisoned_step_too_many_ends_the_run(settings: dict, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, 5, 7)
    with pytest.raises(JobError, match=r"2 consecutive steps \(3 to 4\) had a non-finite"):
        run_training(settings, world_size=2)
    assert (Path(settings["run"]["dir"]) / "checkpoints" / "latest").read_text().split() == [
        "step_00000002"
    ]


@pytest.mark.distributed
def test_a_spike_goes_back_and_its_batches_are_not_seen_again(
    settings: dict, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Spike at step 18, back to step 15; later steps continue with the batches after step 18."""
    loss, seen = step_module._loss, []

    def spiking(mask, losses):
        total, tokens, report = loss(mask, losses)
        seen.append(1)
        high = 9.0 if len(seen) in (35, 36) else 1.0
        return total, tokens, report * torch.tensor([high, 1.0])

    monkeypatch.setattr(step_module, "_loss", spiking)
    settings = {**settings, "guard": {"spike_factor": 3.0}, "checkpoint": {"interval": 15}}
    settings["train"] = {**settings["train"], "steps": 20}
    lines = run_training(settings, world_size=2)
    assert "spiked at step 18" in capfd.readouterr().out
    assert [line["step"] for line in lines] == list(range(21))
    assert [line["tokens/seen"] // (4 * 32) for line in lines[1:]] == [
        *range(1, 16), *range(19, 24),
    ]  # fmt: skip
