"""Rank 0's thread that hears of every rank, and tells all the others when one is lost.

Every rank keeps one connection open and sends lines of JSON: where it is, at least once a second;
``failed``, when it raised; ``bye``, when it is done. A connection that ends without ``bye`` is a
process that ended: the system closes it the moment a rank is killed, so nothing waits for a
timeout. What remains for timeouts are ranks that stand still and machines that vanish.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from megatron_moe.train.verdict import Report, died, failed, hung, silent

TICK_SECONDS = 1.0


@dataclass(slots=True)
class _Rank:
    """The monitor's end of one rank's connection."""

    report: Report
    heard: float


class Monitor:
    """Listens from when it is made until ``close``.

    Args:
        server: A listening socket.
        token: What a connection must begin with; others are not of this job.
        hang_seconds: How long no rank may get on, or one say nothing.
    """

    def __init__(self, server: socket.socket, *, token: str, hang_seconds: float) -> None:
        self._server, self._token, self._limit = server, token, hang_seconds
        self._ranks: dict[socket.socket, _Rank] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._moved = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; ranks that still listen are told that this is no failure."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        next_tick = time.monotonic()
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=TICK_SECONDS / 4):
                connection: Any = key.fileobj
                if connection is self._server:
                    self._accept()
                else:
                    self._read(connection)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_SECONDS
                self._judge()
        self._send({"bye": True})
        for connection in [self._server, *self._unread]:
            connection.close()

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        connection.settimeout(TICK_SECONDS)
        self._unread[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(65536)
        except OSError:
            received = b""
        if not received:
            lost = self._drop(connection)
            if lost is not None:
                self._tell(died(lost.report))
            return
        *lines, self._unread[connection] = (self._unread[connection] + received).split(b"\n")
        for line in lines:
            self._hear(connection, json.loads(line))

    def _hear(self, connection: socket.socket, said: dict[str, Any]) -> None:
        if connection not in self._unread:
            return
        stranger = connection not in self._ranks and said.pop("token", None) != self._token
        if stranger or "bye" in said:
            self._drop(connection)
        elif "failed" in said:
            lost = self._drop(connection)
            if lost is not None:
                self._tell(failed(lost.report, said["failed"]))
        else:
            now, report = time.monotonic(), Report(**said)
            known = self._ranks.get(connection)
            if known is None or report.moves != known.report.moves:
                self._moved = now
            self._ranks[connection] = _Rank(report, now)
            if report.rank == 0:  # so that the others know where it was, should it be lost
                self._send({"rank_0": said})

    def _drop(self, connection: socket.socket) -> _Rank | None:
        self._selector.unregister(connection)
        self._unread.pop(connection)
        connection.close()
        return self._ranks.pop(connection, None)

    def _judge(self) -> None:
        now = time.monotonic()
        quiet = [rank for rank in self._ranks.values() if now - rank.heard > self._limit]
        if quiet:
            self._tell(silent(quiet[0].report, self._limit))
        elif self._ranks and now - self._moved > self._limit:
            reports = {rank.report.rank: rank.report for rank in self._ranks.values()}
            self._tell(hung(reports, self._limit))

    def _tell(self, verdict: str) -> None:
        self._send({"verdict": verdict})

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._unread:
            with contextlib.suppress(OSError):  # a rank that is gone is noticed by its silence
                connection.sendall(json.dumps(message).encode() + b"\n")
