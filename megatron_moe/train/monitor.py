"""Monitor all ranks from a thread of rank 0, and notify the others when one is lost.

Every rank keeps one connection open and sends its stage and step at least once a second,
``failed`` when it raised, and ``bye`` when it is done. A connection that closes without ``bye``
means that the process ended: the system closes the connection as soon as a rank is killed, so no
timeout is needed. Timeouts are only for ranks that hang and machines that disappear.

Anybody on the network can connect. A connection may send one message of a fixed length; unless it
proves within `HANDSHAKE_SECONDS` that it knows the job's secret, it is closed (see `handshake`).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_moe.train.channel import TEXT_CHARACTERS, Channel, Message
from megatron_moe.train.handshake import HELLO_BYTES, check_hello, new_challenge
from megatron_moe.train.verdict import Report, died, failed, hung, silent

TICK_SECONDS = 1.0
HANDSHAKE_SECONDS = 10.0
"""Seconds that a connection has to prove that it belongs to the job."""
UNPROVEN = 128
"""Upper bound for connections without a proof, beyond one for each rank."""


@dataclass(slots=True, eq=False)
class _Stranger:
    """A connection that has not proven anything yet."""

    connection: socket.socket
    host: str
    challenge: bytes
    connected_at: float
    answer: bytes = b""


@dataclass(slots=True, eq=False)
class _Rank:
    """Connection of a rank, its last report, and when it arrived."""

    connection: socket.socket
    channel: Channel
    report: Report
    received_at: float


@dataclass(slots=True)
class _Strangers:
    """Connections without a proof, oldest first, and how many were refused."""

    waiting: dict[socket.socket, _Stranger] = field(default_factory=dict)
    refused: int = 0


class Monitor:
    """Listen to all ranks from construction until ``close``.

    Args:
        servers: Listening sockets.
        secret: The job's secret.
        size: Number of ranks.
        hang_seconds: Upper bound for the time in which no rank makes progress, or one is silent.
        say: Logs the first connection that was refused and, at the end, how many there were.
    """

    def __init__(
        self,
        servers: Sequence[socket.socket],
        *,
        secret: bytes,
        size: int,
        hang_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._secret, self._size, self._limit, self._say = secret, size, hang_seconds, say
        self._servers = servers
        self._ranks: dict[socket.socket, _Rank] = {}
        self._strangers = _Strangers()
        self._moved = time.monotonic()
        self._selector = selectors.DefaultSelector()
        for server in servers:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ, self._accept)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and notify ranks that still listen that this is not a failure."""
        self._closing.set()
        self._thread.join()
        if self._strangers.refused > 1:
            self._say(f"Refused {self._strangers.refused} connections to the watch in all.")

    def _run(self) -> None:
        next_tick = time.monotonic()
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=TICK_SECONDS / 4):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection.fileno() >= 0:  # not closed since by another event
                    key.data(connection)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_SECONDS
                self._check()
        self._send(Message(bye=True))
        for connection in [*self._servers, *self._strangers.waiting, *self._ranks]:
            connection.close()

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, address = server.accept()
        except OSError:  # it closed meanwhile, or this process has no file descriptor left
            self._closing.wait(TICK_SECONDS / 100)
            return
        waiting = self._strangers.waiting
        if len(waiting) >= UNPROVEN + self._size:
            self._refuse(next(iter(waiting.values())))  # a rank that is refused tries again
        connection.setblocking(False)
        stranger = _Stranger(connection, address[0], new_challenge(), time.monotonic())
        waiting[connection] = stranger
        self._selector.register(connection, selectors.EVENT_READ, self._read_answer)
        with contextlib.suppress(OSError):
            connection.send(stranger.challenge)

    def _read_answer(self, connection: socket.socket) -> None:
        stranger = self._strangers.waiting[connection]
        try:
            received = connection.recv(HELLO_BYTES - len(stranger.answer))
        except BlockingIOError:
            return
        except OSError:
            received = b""
        stranger.answer += received
        if not received:
            self._refuse(stranger)
        elif len(stranger.answer) == HELLO_BYTES:
            checked = check_hello(self._secret, stranger.challenge, stranger.answer)
            if checked is None or checked[0] >= self._size:
                self._refuse(stranger)
            else:
                self._trust(stranger, *checked)

    def _trust(self, stranger: _Stranger, rank: int, proof: bytes) -> None:
        connection = stranger.connection
        del self._strangers.waiting[connection]
        with contextlib.suppress(OSError):
            connection.send(proof)
        report = Report(rank=rank, step=0, stage="load")
        now = time.monotonic()
        self._ranks[connection] = _Rank(connection, Channel(connection), report, now)
        self._moved = now
        self._selector.modify(connection, selectors.EVENT_READ, self._read)

    def _refuse(self, stranger: _Stranger) -> None:
        del self._strangers.waiting[stranger.connection]
        self._selector.unregister(stranger.connection)
        stranger.connection.close()
        self._strangers.refused += 1
        if self._strangers.refused == 1:
            with contextlib.suppress(OSError):  # such as a closed standard output
                self._say(
                    f"Refused a connection from {stranger.host}: it did not prove that it belongs "
                    "to this job. Training is not affected; further ones are only counted."
                )

    def _read(self, connection: socket.socket) -> None:
        rank = self._ranks[connection]
        try:
            messages = rank.channel.receive()
        except BlockingIOError:
            return
        except (ValueError, OSError) as error:
            self._drop(rank)
            self._send_verdict(failed(rank.report, f"its report is damaged: {error}"))
            return
        if messages is None:
            self._drop(rank)
            self._send_verdict(died(rank.report))
            return
        for message in messages:
            if connection in self._ranks:
                self._handle(rank, message)

    def _handle(self, rank: _Rank, message: Message) -> None:
        if message.bye:
            self._drop(rank)
        elif message.failed is not None:
            self._drop(rank)
            self._send_verdict(failed(rank.report, message.failed))
        elif message.report is not None:
            rank.received_at = time.monotonic()
            if message.report.moves != rank.report.moves:
                self._moved = rank.received_at
            rank.report = message.report
            if rank.report.rank == 0:  # so that the others know its last stage if it is lost
                self._send(message, droppable=True)

    def _drop(self, rank: _Rank) -> None:
        self._selector.unregister(rank.connection)
        del self._ranks[rank.connection]
        rank.connection.close()

    def _check(self) -> None:
        now = time.monotonic()
        for stranger in list(self._strangers.waiting.values()):
            if now - stranger.connected_at > HANDSHAKE_SECONDS:
                self._refuse(stranger)
        for rank in self._ranks.values():
            rank.channel.flush()
        quiet = [rank for rank in self._ranks.values() if now - rank.received_at > self._limit]
        if quiet:
            self._send_verdict(silent(quiet[0].report, self._limit))
        elif self._ranks and now - self._moved > self._limit:
            reports = {rank.report.rank: rank.report for rank in self._ranks.values()}
            self._send_verdict(hung(reports, self._limit))

    def _send_verdict(self, verdict: str) -> None:
        self._send(Message(verdict=verdict[:TEXT_CHARACTERS]))

    def _send(self, message: Message, *, droppable: bool = False) -> None:
        for rank in self._ranks.values():
            rank.channel.send(message, droppable=droppable)
