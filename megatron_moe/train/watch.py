"""Report this rank's progress to rank 0, and end this rank when another one is lost.

This runs in background threads, because a rank that waits for a lost one is blocked inside a
collective. On a verdict, the training thread gets a moment to leave by itself (gloo raises when a
connection breaks); after that, the process prints the verdict and exits.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_moe.errors import ConfigError, JobError, UserError
from megatron_moe.log import console
from megatron_moe.runtime.memory import resident_bytes
from megatron_moe.runtime.memory_limit import memory_limit
from megatron_moe.runtime.wait import StageClock
from megatron_moe.runtime.world import World
from megatron_moe.train.channel import TEXT_CHARACTERS, Channel, Message
from megatron_moe.train.handshake import new_secret
from megatron_moe.train.monitor import TICK_SECONDS, Monitor
from megatron_moe.train.port import Addresses, connect, hosts_of, listening_on
from megatron_moe.train.verdict import Report, died, reason_of, silent
from megatron_moe.train.waiting import waits_for_ranks

GRACE_SECONDS = 5.0
"""Seconds that the training thread has to leave a collective by itself."""
REPORTS_PER_SECOND = 500
"""Upper bound over all ranks together, so that rank 0 has time for its own work."""

Observe = Callable[[str, int], None]
"""Called with stage and step when this rank enters a stage."""


def unobserved(stage: str, step: int) -> None:
    """Do nothing: the default for jobs without an observer."""


class Watch:
    """Watch one rank inside a ``with`` block, which all ranks must enter together.

    Args:
        world: This rank's position in the job.
        hang_seconds: See ``guard.hang_seconds``.
        observe: Called on the training thread at every stage that this rank enters.
    """

    def __init__(self, world: World, *, hang_seconds: float, observe: Observe) -> None:
        self._world, self._limit, self._observe = world, hang_seconds, observe
        # Ranks that one process has started are on one host, which needs no name.
        host = socket.gethostname() if world.reports is None and world.size > 1 else ""
        self._report = Report(rank=world.rank, step=0, stage="load", host=host)
        self._training_thread = threading.get_ident()
        self._pause = max(0.05, world.size / REPORTS_PER_SECOND)
        self._moved, self._ending = threading.Event(), threading.Event()
        self._rank_0 = Report(rank=0, step=0, stage="load")
        self._verdict: str | None = None
        self._verdict_set = threading.Event()
        self._clock = StageClock(world.device)
        self._clock.start("load")
        self.step = 0
        """Current step, counted from 1; 0 before the first."""
        self._memory_limit = memory_limit()
        self.predicted_memory = ""
        """The planner's prediction in words, for the message of a rank that ran out of memory."""

    def at(self, stage: str) -> None:
        """Record that this rank enters ``stage`` of `step`."""
        self._clock.enter(stage)
        self._report = replace(
            self._report, step=self.step, stage=stage, moves=self._report.moves + 1
        )
        self._moved.set()
        self._observe(stage, self.step)

    def seconds(self) -> dict[str, float]:
        """Return the device seconds of this rank in each stage since `reset_seconds`."""
        return self._clock.seconds()

    def reset_seconds(self) -> None:
        """Start counting the time in stages from zero."""
        self._clock.start(self._report.stage)

    def __enter__(self) -> Self:
        self._monitor, secret, addresses = self._open_port()
        self._socket = connect(addresses, secret, rank=self._world.rank)
        self._socket.settimeout(TICK_SECONDS)
        self._channel = Channel(self._socket)
        # A forked child must not keep this rank's connection open after the rank has died.
        os.register_at_fork(after_in_child=self._socket.close)
        self._threads = [
            threading.Thread(target=self._send_reports, name="watch-send", daemon=True),
            threading.Thread(target=self._listen, name="watch-listen", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        last_message = Message(bye=True)
        if isinstance(error, Exception):
            # When another rank dies, the backend raises a RuntimeError; any other error is this
            # rank's own, and the others are notified immediately.
            if type(error) is RuntimeError or isinstance(error, dist.DistError):
                self._verdict_set.wait(GRACE_SECONDS)
            if self._verdict is None:
                last_message = Message(failed=reason_of(error)[:TEXT_CHARACTERS])
        self._ending.set()
        self._moved.set()
        self._channel.send(last_message)
        for thread in self._threads:
            thread.join()
        self._socket.close()
        if self._monitor is not None:
            self._monitor.close()
        own = isinstance(error, UserError)  # raised on all ranks alike: keep the original error
        if self._verdict is not None and isinstance(error, Exception) and not own:
            raise self._lost(self._verdict) from error

    def _open_port(self) -> tuple[Monitor | None, bytes, Addresses]:
        """Listen on rank 0; return its monitor, and on all ranks the secret and the addresses.

        The secret is broadcast over the ranks' own connections. The rendezvous store would show it
        to whoever connects to it.
        """
        hosts = hosts_of(self._world.address)
        servers: list[socket.socket] = []
        problem = None
        if self._world.rank == 0:
            servers, problem = listening_on(self._world.address, hosts)
        shared: list[Any] = [new_secret(), problem, [s.getsockname()[:2] for s in servers]]
        dist.broadcast_object_list(shared, src=0)
        secret, problem, addresses = shared
        if problem is not None:
            raise ConfigError(problem)
        monitor = None
        if servers:
            monitor = Monitor(
                servers,
                secret=secret,
                size=self._world.size,
                hang_seconds=self._limit,
                say=console.print,
            )
        return monitor, secret, addresses

    def _send_reports(self) -> None:
        while not self._ending.is_set():
            self._channel.send(Message(report=self._located()), droppable=True)
            self._moved.wait(TICK_SECONDS)
            self._moved.clear()
            self._ending.wait(self._pause)

    def _located(self) -> Report:
        """Return the report with the line of Python that the training thread executes."""
        report = self._report
        frame = sys._current_frames().get(self._training_thread)
        waiting, where, innermost = False, "", True
        cuda = self._world.device.type == "cuda"
        while frame is not None:
            file = frame.f_code.co_filename
            waiting |= waits_for_ranks(frame, cuda=cuda and innermost)
            innermost = False
            if "megatron_moe" in file.split(os.sep) or frame.f_back is None:
                where = f"{_shown(file)}:{frame.f_lineno} in {frame.f_code.co_name}"
                break
            frame = frame.f_back
        return replace(report, where=where, waiting=waiting, resident=resident_bytes())

    def _listen(self) -> None:
        """Read messages of rank 0 until it closes the connection or is lost."""
        received_at = time.monotonic()
        while True:
            try:
                messages = self._channel.receive()
            except TimeoutError:
                if self._ending.is_set():
                    return None
                if time.monotonic() - received_at > self._limit:
                    return self._leave(silent(self._rank_0, self._limit))
                continue
            except (OSError, ValueError):  # closed by the training thread, or damaged
                messages = None
            received_at = time.monotonic()
            if messages is None:
                return None if self._ending.is_set() else self._leave(died(self._rank_0))
            for message in messages:
                if message.bye:
                    return None
                if message.verdict is not None:
                    return self._leave(message.verdict)
                self._rank_0 = message.report or self._rank_0

    def _leave(self, verdict: str) -> None:
        """End this process because another rank is lost, via the training thread if possible."""
        self._verdict = verdict
        self._verdict_set.set()
        if not self._ending.wait(GRACE_SECONDS):
            try:
                self._world.report_error(self._lost(verdict))
            finally:  # a report that cannot be written, on a full disk, must not keep the rank
                os._exit(1)

    def _lost(self, verdict: str) -> JobError:
        """Return the error for a verdict, with what this host knows about its memory."""
        limit = memory_limit()
        reason = limit and limit.killed_since(self._memory_limit)
        if reason is None:
            return JobError(verdict)
        return JobError("\n  ".join([verdict, reason, *filter(None, [self.predicted_memory])]))


def _shown(file: str) -> str:
    """Return the path from the current folder, if that exists: it may be removed meanwhile."""
    try:
        return os.path.relpath(file)
    except OSError:
        return file
