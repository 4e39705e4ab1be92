"""Processes that measure when they are told to, so that two programs can take turns step by step.

A worker imports once and forks for each subject it is given, so that what a subject held is gone
when it ends, and the next begins at once. It says one JSON line for each JSON line it is told; what
else it prints goes to stderr. Who waits sleeps, so only the one that was asked uses the cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

Answers = Callable[[dict[str, Any]], dict[str, Any]]
Pipes = tuple[TextIO, TextIO]


class Worker:
    """A script of this folder at work; ``with Worker("step_ours.py", threads=2) as worker``."""

    def __init__(self, script: str, *, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )

    def begin(self, **about: Any) -> None:
        """Let it build what it measures; several workers do so side by side."""
        self._tell(about)

    def wait_ready(self) -> dict[str, Any]:
        """Return when what was begun is built."""
        return self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Tell it to do something with what it has built, and wait for what it says."""
        self._tell(command)
        return self._answer()

    def end(self) -> None:
        """Let go of what was begun, and wait until it is gone."""
        self.ask(do="end")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """A worker that is still at work, because something failed, is not waited for."""
        self._process.terminate()
        self._process.wait()

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)


def take_pipes() -> Pipes:
    """The pipes of this worker, kept from whatever else prints; forked processes have them too."""
    output, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return output, answers


def subjects(pipes: Pipes) -> Iterator[dict[str, Any]]:
    """Yield what to measure; asking for the next reports that the last one has ended."""
    output, answers = pipes
    while line := output.readline():
        yield json.loads(line)
        _say({}, answers)


def serve(answer: Answers, pipes: Pipes, ready: dict[str, Any]) -> None:
    """Say that all is built, then answer every line until one says that this is the end."""
    output, answers = pipes
    _say(ready, answers)
    while line := output.readline():
        command = json.loads(line)
        if command == {"do": "end"}:
            return
        _say(answer(command), answers)


def forked(act: Callable[[], None]) -> None:
    """Do something in a forked process, and wait until it and its memory are gone."""
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"it ended with {process.exitcode}")


def _say(what: dict[str, Any], answers: TextIO) -> None:
    print(json.dumps(what), file=answers, flush=True)
