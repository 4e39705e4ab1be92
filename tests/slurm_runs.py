"""Jobs of launch/slurm.sbatch on a cluster of tests, and what their runs are compared with."""

import json
import sys
from pathlib import Path

import yaml
from recovery import Recovery
from slurm_cluster import Cluster, wait_for
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

ROOT = Path(__file__).parents[1]
RANKS, STEPS = 4, 16
EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "tokens/seen")
QUICK, SLOW = "0", "2"
"""Seconds that a step takes at least: a slow run takes longer than what interrupts it."""


class Runs:
    """Configurations of one tiny model and its text, and the losses of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_dense(folder / "dense")
        write_tokens(folder / "tokens")
        self.expected = lines(run_training(self.settings("undisturbed"), world_size=RANKS))
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "slurm" / "slow_python.py"} "$@"\n'
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
            STEP_SECONDS=step_seconds, OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="lo" if slurm.hosts is None else "eth0",
        ).strip()  # fmt: skip
        return number, self.folder / name

    def recovery(self, name: str) -> Recovery:
        """Measure the recovery of a run from now on, through all of its jobs."""
        logs = f"{name}-*.out"
        return Recovery(
            lambda: last_step(self.folder / name),
            lambda: "".join(path.read_text() for path in sorted(self.folder.glob(logs))),
        )

    def output(self, number: str, name: str) -> str:
        return (self.folder / f"{name}-{number}.out").read_text()


def lines(metrics: list[dict]) -> dict[int, tuple]:
    """Return the newest line of each step, without what depends on time."""
    return {
        line["step"]: tuple(line[key] for key in EXACT) for line in metrics if "loss/lm" in line
    }


def last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return json.loads(file.read_text().splitlines()[-1])["step"] if file.exists() else 0


def reached(run_dir: Path, step: int) -> None:
    wait_for(lambda: last_step(run_dir) >= step, f"step {step} in {run_dir.name}", seconds=400)


def assert_undisturbed(runs: Runs, slurm: Cluster, number: str, run_dir: Path) -> str:
    """Wait for the end of a job, compare its losses, and return its output."""
    slurm.wait_for_end(number)
    assert slurm.job(number)["JobState"] == "COMPLETED", runs.output(number, run_dir.name)
    assert lines(read_metrics(run_dir)) == runs.expected
    return runs.output(number, run_dir.name)
