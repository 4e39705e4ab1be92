"""Run jobs in parallel; each writes a result file, and jobs with a result are skipped.

A worker takes the first job whose needs exist, so the order of the list is the order of preference.
Jobs are forked from one process that has imported everything, so that a job of ten seconds does not
spend ten more on imports.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_moe.errors import UserError

WAITING, TAKEN, FAILED = range(3)


@dataclass(frozen=True, slots=True)
class Job:
    """A unit of work that is done when its result file exists."""

    name: str
    result: Path
    """Result file or folder, written last and atomically."""
    work: Callable[[], None]
    needs: tuple[Path, ...] = ()


def do_all(jobs: Sequence[Job], *, workers: int, logs: Path, until: float | None = None) -> None:
    """Run all jobs without a result; the output of a job goes to ``logs``/NAME.log.

    Args:
        jobs: Jobs in order of preference.
        workers: Number of jobs to run in parallel.
        logs: Folder for the jobs' output.
        until: No job starts after this time (of ``time.time``); None runs all jobs.

    Raises:
        UserError: Some jobs failed; the message names their logs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = get_context("fork")
    states: Any = context.Array("b", len(jobs))
    processes = [
        context.Process(target=_work, args=(list(jobs), states, logs, until))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [job.name for job, state in zip(jobs, states[:], strict=True) if state == FAILED]
    if failed:
        files = ", ".join(str(logs / f"{name}.log") for name in failed)
        raise UserError(f"{len(failed)} jobs of the study failed; see {files}")


def _work(jobs: list[Job], states: Any, logs: Path, until: float | None) -> None:
    while (index := _take(jobs, states, until)) is not None:
        if index < 0:  # the remaining jobs need the result of a running one
            time.sleep(1)
            continue
        job, start = jobs[index], time.monotonic()
        failed = False
        with _output_to(logs / f"{job.name}.log"):
            try:
                job.work()
            except Exception:  # logged; the other jobs continue
                traceback.print_exc()
                failed = True
        states[index] = FAILED if failed or not job.result.exists() else TAKEN
        status = "FAILED" if states[index] == FAILED else "done"
        print(f"{job.name}: {status}, {time.monotonic() - start:.0f} s", flush=True)


def _take(jobs: list[Job], states: Any, until: float | None) -> int | None:
    """Return the index of the next job, -1 if none is ready yet, or None if none is left."""
    with states.get_lock():
        left = [
            index
            for index, job in enumerate(jobs)
            if states[index] == WAITING and not job.result.exists()
        ]
        if not left or (until is not None and time.time() > until):
            return None
        ready = [i for i in left if all(path.exists() for path in jobs[i].needs)]
        if ready:
            states[ready[0]] = TAKEN
            return ready[0]
        busy = any(
            states[index] == TAKEN and not job.result.exists() for index, job in enumerate(jobs)
        )
        return -1 if busy else None


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect the output of this process and its children to ``path``."""
    saved = os.dup(1), os.dup(2)
    with path.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, before in zip((1, 2), saved, strict=True):
                os.dup2(before, number)
                os.close(before)
