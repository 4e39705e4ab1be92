"""A killed run, started again with the same command, is the run that was never killed."""

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from commands import Command, run_command, start_command
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import newest, read_progress, step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "router/load_imbalance", "tokens/seen")
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("resume")
    dense, tokens = save_dense(root / "dense"), write_tokens(root / "tokens")
    return {"root": root, "dense": dense, "tokens": tokens}


def settings(inputs: dict[str, Path], name: str, precision: str) -> dict:
    return tree(
        inputs["root"] / name, inputs["dense"], inputs["tokens"],
        parallel={"expert_parallel_size": 2},
        train={"steps": STEPS, "precision": precision}, checkpoint={"interval": 3, "keep": 2},
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_changes_no_bit(inputs: dict[str, Path], precision: str):
    whole = run_training(settings(inputs, f"whole-{precision}", precision), world_size=2)

    killed = settings(inputs, f"killed-{precision}", precision)
    run_dir = Path(killed["run"]["dir"])
    config = inputs["root"] / f"{precision}.yaml"
    config.write_text(yaml.safe_dump(killed))
    command = ("train", config, "--ranks", 2)
    job = start_command(*command)
    wait_for_step(run_dir, 4, job)
    psutil.Process(job.process.pid).children()[-1].send_signal(signal.SIGKILL)
    ended = job.wait()
    assert ended.returncode != 0, ended
    saved = newest(run_dir)
    assert saved is not None
    first = read_progress(saved).step
    assert 3 <= first < STEPS, ended

    again = run_command(*command, check=True)
    assert f"at step {first}" in again.stdout
    assert "upcycled" not in again.stdout
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for ours, expected in zip(lines[1:], whole[1:], strict=True):
        assert {k: ours[k] for k in EXACT} == {k: expected[k] for k in EXACT}
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step_*")) == [
        "step_00000009", "step_00000012",
    ]  # fmt: skip


def wait_for_step(run_dir: Path, step: int, job: Command) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and read_whole_lines(run_dir) > step:
            return
        assert job.process.is_alive(), job.wait()
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


def read_whole_lines(run_dir: Path) -> int:
    return (run_dir / "metrics.jsonl").read_text().count("\n")


def test_an_upcycled_checkpoint_without_steps_is_where_training_starts(inputs: dict[str, Path]):
    """steps=0, then more, is the run that took the steps at once."""
    dense = save_dense(inputs["root"] / "tied", tie_word_embeddings=True)
    changes = {"parallel": {"pipeline_parallel_size": 2}, "checkpoint": {"interval": 2}}
    at_once = tree(inputs["root"] / "at-once", dense, inputs["tokens"], **changes)
    expected = run_training(at_once, world_size=2)

    in_parts = tree(inputs["root"] / "in-parts", dense, inputs["tokens"], **changes)
    none = {**in_parts, "train": {**in_parts["train"], "steps": 0}}
    assert [line["step"] for line in run_training(none, world_size=2)] == [0]
    lines = run_training(in_parts, world_size=2)
    assert {k: lines[-1][k] for k in EXACT} == {k: expected[-1][k] for k in EXACT}


def test_two_buckets_of_optimizer_state_survive(inputs: dict[str, Path]):
    """Tied embeddings on two stages have a bucket of their own, with padding before it."""
    dense = save_dense(inputs["root"] / "tied2", tie_word_embeddings=True)
    changes = {"parallel": {"pipeline_parallel_size": 2}, "checkpoint": {"interval": 2}}
    whole = tree(inputs["root"] / "whole-tied", dense, inputs["tokens"], **changes)
    expected = run_training(whole, world_size=2)
    latest = inputs["root"] / "whole-tied" / "checkpoints" / "latest"
    latest.write_text("step_00000002\n")  # as if the run had been killed after step 2
    lines = run_training(whole, world_size=2)
    for ours, first in zip(lines[3:], expected[3:], strict=True):
        assert {k: ours[k] for k in EXACT} == {k: first[k] for k in EXACT}


def test_a_save_beside_training_is_the_save_that_waited(inputs: dict[str, Path]):
    """Training goes on and changes every number while its copy is written."""
    dense, changes = inputs["dense"], {"parallel": {"expert_parallel_size": 2}}
    waited = tree(inputs["root"] / "waited", dense, inputs["tokens"], **changes,
                  checkpoint={"interval": 2})  # fmt: skip
    beside = tree(inputs["root"] / "beside", dense, inputs["tokens"], **changes,
                  checkpoint={"interval": 2, "async_save": True})  # fmt: skip
    for run in (waited, beside):
        run_training(run, world_size=2)
    for step in (2, 4, 5):
        folders = [step_folder(inputs["root"] / name, step) for name in ("waited", "beside")]
        with GlobalTensors(folders[0]) as theirs, GlobalTensors(folders[1]) as ours:
            assert ours.names == theirs.names
            for name in ours.names:
                a, b = (x.read(name, index=None, dtype=torch.float32) for x in (theirs, ours))
                assert torch.equal(a, b), (step, name)


def test_a_save_that_fails_fails_on_every_rank_and_leaves_the_one_before(
    inputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
):
    run = settings(inputs, "no-room", "fp32")
    run["guard"] = {"save_retry_seconds": 0.0}
    config = build(RunConfig, run)
    config.run.dir.mkdir()
    with pytest.raises(CheckpointError, match=f"step {STEPS} could not be saved"):
        run_on_ranks(train_without_room, config, world_size=2)
    assert "rank 1: OSError: no room left" in capfd.readouterr().out.replace("\n", " ")
    saved = newest(config.run.dir)
    assert saved is not None
    assert read_progress(saved).step == 3
    lines = run_training(run, world_size=2)  # and the run goes on when there is room again
    assert lines[-1]["step"] == STEPS


def train_without_room(world: World, config: RunConfig) -> None:
    """Rank 1 finds no room from the second checkpoint on."""
    from megatron_moe.checkpoint import storage
    from megatron_moe.commands.train import train

    write = storage.HashingWriter.write_data

    def full(self: Any, *args: Any) -> Any:
        if world.rank == 1 and "00000003" not in str(self.path):
            raise OSError("no room left")
        return write(self, *args)

    storage.HashingWriter.write_data = full
    train(config, world)
