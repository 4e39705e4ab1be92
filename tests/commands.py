"""Run a command of the program in a fork of the test process.

The fork has already imported torch and Megatron-Core, for which a new interpreter needs five CPU
seconds. Tests of imports and of what a new interpreter prints start one.
"""

import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import TextIO

from megatron_moe.cli.main import main


@dataclass(frozen=True, slots=True)
class Command:
    """A command that runs, and the files that hold what it prints."""

    process: BaseProcess
    out: TextIO
    err: TextIO

    def wait(self, timeout: float = 120) -> CompletedProcess[str]:
        """Wait for the end; kill a command that takes longer, and fail."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        assert code is not None
        return CompletedProcess(self.process.name, code, read(self.out), read(self.err))


def read(file: TextIO) -> str:
    """Return what a file holds so far, without moving the position that the fork writes at."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def start_command(
    *words: object, cwd: Path | None = None, prepare: Callable[[], None] = lambda: None
) -> Command:
    """Start ``megatron-moe WORDS`` in a folder, after the fork has called ``prepare``."""
    files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
    name = " ".join(map(str, words))
    arguments = (list(map(str, words)), files, cwd, prepare)
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments, name=name)
    process.start()
    return Command(process, *files)


def run_command(
    *words: object,
    cwd: Path | None = None,
    prepare: Callable[[], None] = lambda: None,
    check: bool = False,
    timeout: float = 120,
) -> CompletedProcess[str]:
    """Run ``megatron-moe WORDS`` to its end; with ``check``, it must succeed."""
    done = start_command(*words, cwd=cwd, prepare=prepare).wait(timeout)
    assert not (check and done.returncode), done.stderr
    return done


def _run(
    words: list[str], files: list[TextIO], cwd: Path | None, prepare: Callable[[], None]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    logging.root.handlers.clear()  # pytest's
    if cwd is not None:
        os.chdir(cwd)
    prepare()
    sys.argv = ["megatron-moe", *words]
    main()
