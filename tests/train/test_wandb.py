"""Weights & Biases itself, offline: one run for all jobs, and credentials before the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="the extra wandb is not installed")

JOB = """
import sys
from pathlib import Path
from megatron_moe.config.data import Data
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.run import Log, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.rules.installed import require_packages
from megatron_moe.train.metrics import MetricsWriter

folder, first = Path(sys.argv[1]), int(sys.argv[2])
config = RunConfig(
    run=Run(dir=folder), source=Source(path=folder), moe=Moe(num_moe_experts=2),
    data=Data(path=folder), train=Train(steps=9), log=Log(tensorboard=False, wandb_project="test"),
)
require_packages(config)
writer = MetricsWriter(config, resumed_step=first - 1)
for step in (first, first + 1):
    writer.write({"step": step, "loss/lm": 1.0})
writer.close()
"""


def job(folder: Path, first: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Write two steps as a job of its own would; no credentials of this machine are visible."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    hidden = {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    return subprocess.run(
        [sys.executable, "-c", JOB, str(folder), str(first)],
        env={**kept, **hidden, **environment}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_jobs_that_resume_a_run_write_to_one_run_offline(tmp_path: Path):
    for first in (1, 3):
        done = job(tmp_path, first, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    identity = (tmp_path / "wandb_id").read_text().strip()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2


def test_a_run_without_credentials_is_refused_before_it_starts(tmp_path: Path):
    refused = job(tmp_path, 1)
    assert refused.returncode == 1
    assert (
        "log.wandb_project (test) requires credentials of Weights & Biases, and wandb finds none"
        in refused.stderr
    )
    assert not (tmp_path / "metrics.jsonl").exists()
