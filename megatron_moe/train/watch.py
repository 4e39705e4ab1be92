"""A rank's end of the watch: says where this rank is, and ends it when another is lost.

A thread beside training, because a rank that waits for a lost one sits inside a collective and does
nothing any more: on a verdict it gives the training thread a moment to come out by itself (gloo
raises when a connection breaks), then tells what happened and ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_moe.errors import JobError, UserError
from megatron_moe.runtime.wait import StageClock
from megatron_moe.runtime.world import World
from megatron_moe.train.monitor import TICK_SECONDS, Monitor
from megatron_moe.train.verdict import Report, died, silent
from megatron_moe.train.waiting import waits_for_ranks

GRACE_SECONDS = 5.0
"""How long the training thread may take to come out by itself."""
REPORTS_PER_SECOND = 500
"""Of all ranks together, so that rank 0 has time for its own work."""

Observe = Callable[[str, int], None]
"""Called as this rank enters a stage of a step."""


def unobserved(stage: str, step: int) -> None:
    """Nobody looks."""


class Watch:
    """One a rank, around all it does; the ``with`` block is entered by all ranks together.

    Args:
        world: This rank's place.
        hang_seconds: See ``guard.hang_seconds``.
        observe: Called at every stage this rank enters, on the training thread.
    """

    def __init__(self, world: World, *, hang_seconds: float, observe: Observe) -> None:
        self._world, self._limit, self._observe = world, hang_seconds, observe
        self._report = Report(rank=world.rank, step=0, stage="load")
        self._training_thread = threading.get_ident()
        self._pause = max(0.05, world.size / REPORTS_PER_SECOND)
        self._moved, self._ending = threading.Event(), threading.Event()
        self._rank_0 = Report(rank=0, step=0, stage="load")
        self._verdict: str | None = None
        self._judged = threading.Event()
        self._clock = StageClock(world.device)
        self._clock.start("load")
        self.step = 0
        """The step that is being taken, counted from 1; 0 before the first."""

    def at(self, stage: str) -> None:
        """This rank enters ``stage`` of `step`."""
        self._clock.enter(stage)
        self._report = Report(self._world.rank, self.step, stage, self._report.moves + 1)
        self._moved.set()
        self._observe(stage, self.step)

    def seconds(self) -> dict[str, float]:
        """Return the time of this rank in each stage, on its device, since `reset_seconds`."""
        return self._clock.seconds()

    def reset_seconds(self) -> None:
        """Count the time in stages from here on."""
        self._clock.start(self._report.stage)

    def __enter__(self) -> Self:
        self._monitor, address, self._token = self._meet()
        self._socket = socket.create_connection(address, timeout=60)
        self._socket.settimeout(TICK_SECONDS)
        # A forked helper must not keep this rank's connection alive when the rank is dead.
        os.register_at_fork(after_in_child=self._socket.close)
        self._threads = [
            threading.Thread(target=self._speak, name="watch-speak", daemon=True),
            threading.Thread(target=self._listen, name="watch-listen", daemon=True),
        ]
        self._say({"token": self._token, **asdict(self._report)})
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        last_word: dict[str, Any] = {"bye": True}
        if isinstance(error, Exception):
            # What breaks when another rank dies is a RuntimeError of the backend; anything else is
            # this rank's own, and the others hear of it at once.
            if type(error) is RuntimeError or isinstance(error, dist.DistError):
                self._judged.wait(GRACE_SECONDS)
            if self._verdict is None:
                last_word = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        self._ending.set()
        self._moved.set()
        self._say(last_word)
        for thread in self._threads:
            thread.join()
        self._socket.close()
        if self._monitor is not None:
            self._monitor.close()
        own = isinstance(error, UserError)  # what all ranks refuse, each says for itself
        if self._verdict is not None and isinstance(error, Exception) and not own:
            raise JobError(self._verdict) from error

    def _meet(self) -> tuple[Monitor | None, tuple[str, int], str]:
        """Rank 0 opens a port and every rank learns of it."""
        monitor, where = None, [None, None]
        if self._world.rank == 0:
            local = self._world.address == "127.0.0.1"
            server = socket.create_server((self._world.address if local else "", 0), backlog=4096)
            where = [server.getsockname()[1], secrets.token_hex(16)]
            monitor = Monitor(server, token=str(where[1]), hang_seconds=self._limit)
        dist.broadcast_object_list(where, src=0)
        port, token = where
        assert isinstance(port, int)
        return monitor, (self._world.address, port), str(token)

    def _speak(self) -> None:
        while not self._ending.is_set():
            self._say(asdict(self._located()))
            self._moved.wait(TICK_SECONDS)
            self._moved.clear()
            self._ending.wait(self._pause)

    def _located(self) -> Report:
        """The report, with the line of Python that the training thread executes."""
        report = self._report
        frame = sys._current_frames().get(self._training_thread)
        waiting, where, innermost = False, "", True
        cuda = self._world.device.type == "cuda"
        while frame is not None:
            file = frame.f_code.co_filename
            waiting |= waits_for_ranks(frame, cuda=cuda and innermost)
            innermost = False
            if "megatron_moe" in file.split(os.sep) or frame.f_back is None:
                where = f"{os.path.relpath(file)}:{frame.f_lineno} in {frame.f_code.co_name}"
                break
            frame = frame.f_back
        return Report(report.rank, report.step, report.stage, report.moves, where, waiting)

    def _listen(self) -> None:
        """Hear rank 0 until it hangs up: on our last word, or because it is lost."""
        unread, heard = b"", time.monotonic()
        while True:
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                if self._ending.is_set():
                    return None
                if time.monotonic() - heard > self._limit:
                    return self._judge(silent(self._rank_0, self._limit))
                continue
            except OSError:
                received = b""
            heard = time.monotonic()
            if not received:
                return None if self._ending.is_set() else self._judge(died(self._rank_0))
            *lines, unread = (unread + received).split(b"\n")
            for message in map(json.loads, lines):
                if "bye" in message:
                    return None
                if "verdict" in message:
                    return self._judge(message["verdict"])
                self._rank_0 = Report(**message["rank_0"])

    def _judge(self, verdict: str) -> None:
        """Another rank is lost: leave, through the training thread if it still can."""
        self._verdict = verdict
        self._judged.set()
        if not self._ending.wait(GRACE_SECONDS):
            self._world.last_words(JobError(verdict))
            os._exit(1)

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # rank 0 is gone; the listening thread knows
            self._socket.sendall(json.dumps(message).encode() + b"\n")
