"""Processes that measure when they are told to, so that two programs can take turns step by step.

A worker says one JSON line for each JSON line it is told. What else it prints goes to stderr. Who
waits sleeps, so only the one that was asked uses the cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Answers = Callable[[dict[str, Any]], dict[str, Any]]


class Worker:
    """A script of this folder at work; ``with Worker("step_ours.py", {...}) as worker``."""

    def __init__(self, script: str, about: dict[str, Any], *, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self.ready: dict[str, Any] | None = None

    def wait_ready(self) -> dict[str, Any]:
        """Return when it has imported and built what it measures; several do so side by side."""
        if self.ready is None:
            self.ready = self._answer()
        return self.ready

    def ask(self, **command: Any) -> dict[str, Any]:
        """Tell it to do something, and wait for what it says."""
        self.wait_ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.close()


def take_pipes() -> tuple[TextIO, TextIO]:
    """The pipes of this worker, kept from whatever else prints; forked ranks have them too."""
    told, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return told, answers


def serve(answer: Answers, pipes: tuple[TextIO, TextIO], ready: dict[str, Any]) -> None:
    """Answer every line until the pipe is closed."""
    told, answers = pipes
    print(json.dumps(ready), file=answers, flush=True)
    while line := told.readline():
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
