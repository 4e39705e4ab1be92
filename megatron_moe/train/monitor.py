"""Monitor all ranks from a thread of rank 0, and notify the others when one is lost.

Every rank keeps one connection open and sends lines of JSON: its stage and step at least once a
second, ``failed`` when it raised, and ``bye`` when it is done. A connection that closes without
``bye`` means that the process ended: the system closes the connection as soon as a rank is killed,
so no timeout is needed. Timeouts are only for ranks that hang and machines that disappear.
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
    """Last report of one rank, and when it arrived."""

    report: Report
    received_at: float


class Monitor:
    """Listen to all ranks from construction until ``close``.

    Args:
        server: A listening socket.
        token: Token that the first message must contain; connections without it are closed.
        hang_seconds: Upper bound for the time in which no rank makes progress, or one is silent.
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
        """Stop listening, and notify ranks that still listen that this is not a failure."""
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
                self._check()
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
                self._send_verdict(died(lost.report))
            return
        *lines, self._unread[connection] = (self._unread[connection] + received).split(b"\n")
        for line in lines:
            self._handle(connection, json.loads(line))

    def _handle(self, connection: socket.socket, message: dict[str, Any]) -> None:
        if connection not in self._unread:
            return
        stranger = connection not in self._ranks and message.pop("token", None) != self._token
        if stranger or "bye" in message:
            self._drop(connection)
        elif "failed" in message:
            lost = self._drop(connection)
            if lost is not None:
                self._send_verdict(failed(lost.report, message["failed"]))
        else:
            now, report = time.monotonic(), Report(**message)
            known = self._ranks.get(connection)
            if known is None or report.moves != known.report.moves:
                self._moved = now
            self._ranks[connection] = _Rank(report, now)
            if report.rank == 0:  # so that the others know its last stage if it is lost
                self._send({"rank_0": message})

    def _drop(self, connection: socket.socket) -> _Rank | None:
        self._selector.unregister(connection)
        self._unread.pop(connection)
        connection.close()
        return self._ranks.pop(connection, None)

    def _check(self) -> None:
        now = time.monotonic()
        quiet = [rank for rank in self._ranks.values() if now - rank.received_at > self._limit]
        if quiet:
            self._send_verdict(silent(quiet[0].report, self._limit))
        elif self._ranks and now - self._moved > self._limit:
            reports = {rank.report.rank: rank.report for rank in self._ranks.values()}
            self._send_verdict(hung(reports, self._limit))

    def _send_verdict(self, verdict: str) -> None:
        self._send({"verdict": verdict})

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._unread:
            with contextlib.suppress(OSError):  # a lost rank is detected by its silence
                connection.sendall(json.dumps(message).encode() + b"\n")
