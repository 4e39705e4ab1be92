"""Strangers on the port of the watch, which then must still name a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from attacks import ATTACKS, WatchPort

from faults.fault import IN_THE_MIDDLE_SECONDS, STEPS, Fault
from megatron_moe.train import watch

PATIENCE_SECONDS = 120.0
"""Upper bound for the time that a job waits in its last step for the end of an attack."""


def attacked(kind: str) -> Fault:
    """Attack the port while the job trains; after that, in its last step, rank 1 is killed."""
    noted: list[Path] = []

    def prepare(run_dir: Path) -> None:
        noted.append(run_dir)
        _note_the_port(_port(run_dir))

    def observe(rank: int, stage: str, step: int) -> None:
        if (rank, stage, step) == (1, "forward", STEPS):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not _done(noted[0]).exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(IN_THE_MIDDLE_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_job(_: int, run_dir: Path) -> None:
        port = json.loads(_port(run_dir).read_text())
        address, secret = tuple(port["address"]), bytes.fromhex(port["secret"])
        ATTACKS[kind](WatchPort(address, secret, replayed_rank=1))
        _done(run_dir).touch()

    return Fault(
        name=f"{kind.replace('-', ' ')} at the port of the watch, then kill -9 of rank 1",
        prepare=prepare,
        observe=observe,
        on_job=on_job,
    )


def _note_the_port(file: Path) -> None:
    """Write the port's address and the job's secret, which a replay passes on, to a file."""
    listening_on, secret = watch.listening_on, watch.new_secret()

    def noting(*args: Any) -> Any:
        servers, problem = listening_on(*args)
        noted = {"address": servers[0].getsockname()[:2], "secret": secret.hex()}
        file.write_text(json.dumps(noted))
        return servers, problem

    watch.listening_on, watch.new_secret = noting, lambda: secret


def _port(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.port")


def _done(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.attacked")
