"""launch/slurm.sbatch on a real SLURM: every job ends with the losses of an undisturbed run.

Two nodes of two ranks each. `make test-slurm` runs these tests; they need root and the packages
munge, slurmctld, slurmd and slurm-client of Debian or Ubuntu.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import NODES, Cluster, cluster, missing_programs, wait_for
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

ROOT = Path(__file__).parents[2]
RANKS, STEPS = 4, 16
EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "tokens/seen")
QUICK, SLOW = "0", "2"
"""Seconds that a step takes at least: a slow run takes longer than what interrupts it."""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()) or os.geteuid() != 0,
        reason=f"needs root and {', '.join(missing_programs()) or 'nothing else'}",
    ),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    # Short, because a Unix socket lies in it.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        cluster(Path(folder)) as running,
    ):
        yield running


class Runs:
    """Configurations of one tiny model and its text, and the losses of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_dense(folder / "dense")
        write_tokens(folder / "tokens")
        self.expected = lines(run_training(self.settings("undisturbed"), world_size=RANKS))
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "slow_python.py"} "$@"\n'
        )
        self.python.chmod(0o755)

    def settings(self, name: str) -> dict:
        return tree(
            self.folder / name, self.folder / "dense", self.folder / "tokens",
            parallel={"expert_parallel_size": 2}, train={"steps": STEPS},
            checkpoint={"interval": 5},
        )  # fmt: skip

    def submit(
        self, slurm: Cluster, name: str, *options: str, step_seconds: str = QUICK
    ) -> tuple[str, Path]:
        """Submit the shipped script; return the job's number and its run folder."""
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(self.settings(name)))
        words = (
            "sbatch", "--parsable", f"--chdir={ROOT}", "--nodes=2", "--ntasks-per-node=2",
            "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder / name}-%j.out",
            *options, "launch/slurm.sbatch", str(config),
        )  # fmt: skip
        number = slurm.run(
            *words, SLURM_SUBMIT_DIR=str(ROOT), PYTHON=str(self.python), PYTHONPATH=str(ROOT),
            STEP_SECONDS=step_seconds, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
        ).strip()  # fmt: skip
        return number, self.folder / name

    def output(self, number: str, name: str) -> str:
        return (self.folder / f"{name}-{number}.out").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def lines(metrics: list[dict]) -> dict[int, tuple]:
    """Return the newest line of each step, without what depends on time."""
    return {
        line["step"]: tuple(line[key] for key in EXACT) for line in metrics if "loss/lm" in line
    }


def last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return json.loads(file.read_text().splitlines()[-1])["step"] if file.exists() else 0


def reached(run_dir: Path, step: int) -> None:
    wait_for(lambda: last_step(run_dir) >= step, f"step {step} in {run_dir.name}")


def assert_undisturbed(runs: Runs, slurm: Cluster, number: str, run_dir: Path) -> str:
    """Wait for the end of a job, compare its losses, and return its output."""
    slurm.wait_for_end(number)
    assert slurm.job(number)["JobState"] == "COMPLETED", runs.output(number, run_dir.name)
    assert lines(read_metrics(run_dir)) == runs.expected
    return runs.output(number, run_dir.name)


def test_a_job_on_two_nodes_equals_local_ranks(slurm: Cluster, runs: Runs):
    number, run_dir = runs.submit(slurm, "two-nodes")
    output = assert_undisturbed(runs, slurm, number, run_dir)
    assert "slurm.sbatch: 4 ranks on 2 nodes" in output
    assert slurm.job(number)["NodeList"] == "n[1-2]"


def test_out_of_time_saves_requeues_and_resumes(slurm: Cluster, runs: Runs):
    # SLURM checks time limits twice a minute, so the signal comes 60 to 90 s after the start.
    options = ("--time=2", "--signal=B:USR1@60")
    number, run_dir = runs.submit(slurm, "out-of-time", *options, step_seconds="6")
    output = assert_undisturbed(runs, slurm, number, run_dir)
    assert "slurm.sbatch: time is nearly up, saving" in output
    assert "Stopped by a signal after step" in output
    assert int(slurm.job(number)["Restarts"]) >= 1


def test_a_preempted_job_saves_and_resumes(slurm: Cluster, runs: Runs):
    number, run_dir = runs.submit(slurm, "preempted", step_seconds=SLOW)
    reached(run_dir, 2)
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        f"--output={runs.folder}/urgent.out", "--wrap=sleep 1",
    ).strip()  # fmt: skip
    slurm.wait_for_state(urgent, "COMPLETED")
    output = assert_undisturbed(runs, slurm, number, run_dir)
    assert "Stopped by a signal after step" in output
    assert int(slurm.job(number)["Restarts"]) == 1


def test_a_lost_node_requeues_the_job(slurm: Cluster, runs: Runs):
    number, run_dir = runs.submit(slurm, "lost-node", step_seconds=SLOW)
    reached(run_dir, 6)
    slurm.kill_node(NODES[1])
    wait_for(lambda: int(slurm.job(number)["Restarts"]) == 1, "restart", seconds=120)
    slurm.start_node(NODES[1])
    output = assert_undisturbed(runs, slurm, number, run_dir)
    assert "JobError: rank 2 died" in output or "JobError: rank 3 died" in output


def test_a_cancelled_job_ends_and_its_successor_resumes(slurm: Cluster, runs: Runs):
    number, run_dir = runs.submit(slurm, "cancelled", step_seconds=SLOW)
    reached(run_dir, 6)
    slurm.run("scancel", number)
    slurm.wait_for_state(number, "CANCELLED", seconds=60)
    wait_for(slurm.idle, "idle nodes")
    assert last_step(run_dir) < STEPS
    number, _ = runs.submit(slurm, "cancelled")
    assert_undisturbed(runs, slurm, number, run_dir)
