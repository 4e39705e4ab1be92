"""Tests of the watch's port: whatever strangers send to it, the ranks stay watched.

Strangers are real TCP connections. After each attack a rank is lost, and the other must be told.
"""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from attacks import ATTACKS, Attack, WatchPort, read_all

from megatron_moe.train import monitor as monitors
from megatron_moe.train.channel import LINE_BYTES, Channel, Message
from megatron_moe.train.handshake import HELLO_BYTES, HandshakeError, hello, introduce, new_secret
from megatron_moe.train.monitor import UNPROVEN, Monitor
from megatron_moe.train.port import connect
from megatron_moe.train.verdict import Report

PATIENCE = 120.0
"""Seconds for what takes a moment, because a machine may be busy."""


@dataclass
class Job(WatchPort):
    """A monitor and its ranks, without the ranks' processes."""

    said: list[str] = field(default_factory=list)
    ranks: dict[int, socket.socket] = field(default_factory=dict)

    def join(self, rank: int) -> Channel:
        connection = connect([self.address], self.secret, rank=rank)
        connection.settimeout(PATIENCE)
        self.ranks[rank] = connection
        channel = Channel(connection)
        channel.send(Message(report=Report(rank, 3, "forward", moves=1)))
        return channel


def open_server() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=4096)


@pytest.fixture
def job() -> Iterator[Job]:
    server, secret = open_server(), new_secret()
    it = Job(server.getsockname(), secret, replayed_rank=2)
    monitor = Monitor([server], secret=secret, size=3, hang_seconds=60, say=it.said.append)
    yield it
    for connection in it.ranks.values():
        connection.close()
    monitor.close()


def verdict_of(channel: Channel) -> str:
    """Return the verdict that a rank receives next."""
    while (messages := channel.receive()) is not None:
        for message in messages:
            if message.verdict is not None:
                return message.verdict
    return ""


def check_attack(job: Job, attack: Attack) -> None:
    first, second = job.join(0), job.join(1)
    count = attack(job)
    end = time.monotonic() + PATIENCE
    while not job.said and time.monotonic() < end:
        time.sleep(0.01)
    second.send(Message(report=Report(1, 5, "backward", moves=2)))
    job.ranks.pop(1).close()
    assert verdict_of(first).startswith("rank 1 died in the backward stage of step 5")
    refused = [line for line in job.said if line.startswith("Refused a connection from 127.0.0.1")]
    assert len(refused) == len(job.said) == 1, f"{count} strangers are logged once"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_ranks_stay_watched(job: Job, attack: Attack):
    check_attack(job, attack)


@pytest.mark.parametrize("drip", [b"", b"x"], ids=["says-nothing", "a-byte-at-a-time"])
def test_a_slow_stranger_is_closed_in_time(job: Job, monkeypatch: pytest.MonkeyPatch, drip: bytes):
    monkeypatch.setattr(monitors, "HANDSHAKE_SECONDS", 1.0)
    first = job.join(0)
    start = time.monotonic()
    with job.stranger() as stranger:
        stranger.settimeout(0.1)
        closed = False
        while not closed and time.monotonic() < start + 60:
            with contextlib.suppress(TimeoutError):
                stranger.send(drip)
                closed = stranger.recv(64) == b""
    assert closed
    assert time.monotonic() - start >= 1
    second = job.join(1)
    second.send(Message(failed="ValueError: reason"))
    assert "ValueError: reason" in verdict_of(first)


def test_connections_that_stay_open_are_bounded(job: Job):
    """Oldest are closed first, and ranks connect although strangers keep the port full."""
    strangers = [job.stranger() for _ in range(UNPROVEN + 3 + 40)]
    first = job.join(0)
    with contextlib.ExitStack() as kept:
        for stranger in strangers:
            kept.enter_context(stranger).settimeout(PATIENCE)
        assert len(read_all(strangers[0])) == 32, "challenged and closed"
        assert len(strangers[-1].recv(64)) == 32
        strangers[-1].settimeout(0.2)
        with pytest.raises(TimeoutError):
            strangers[-1].recv(1)  # still open
    job.join(1)
    job.ranks.pop(1).close()
    assert "rank 1 died" in verdict_of(first)


def test_a_rank_that_reads_nothing_delays_no_other(job: Job):
    """Rank 0's reports go to all ranks; one that does not read them fills its buffers."""
    first = job.join(0)
    job.join(1)  # never reads
    other = job.join(2)
    long = "x" * 4000
    for moves in range(2, 4000):  # 16 MB, more than a connection buffers
        first.send(Message(report=Report(0, 3, "forward", moves=moves, where=long)))
        first._connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            first.receive()
        first._connection.settimeout(PATIENCE)
    first.send(Message(failed="ValueError: the end"))
    assert "ValueError: the end" in verdict_of(other)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b'{"report": {"rank": 1}}\n', "Field required"),
        (b'{"report": {"rank": 1, "step": 3, "stage": "lunch"}}\n', "the stage is unknown"),
        (b"no JSON\n", "Invalid JSON"),
        (b"[" * 60000 + b"\n", "recursion limit"),
        (b"x" * 2 * LINE_BYTES, "more than 65536 bytes"),
    ],
    ids=["fields-missing", "unknown-stage", "no-json", "nested", "too-long"],
)
def test_a_rank_whose_reports_are_damaged_is_named(job: Job, sent: bytes, reason: str):
    first = job.join(0)
    job.join(1)
    job.ranks[1].sendall(sent)
    start = "rank 1 failed in the .*: its report is damaged: .*"
    assert re.match(start + reason, verdict := verdict_of(first)), verdict


def test_a_rank_refuses_a_rank_0_that_does_not_know_the_secret():
    """An impostor on the port learns nothing, and the rank reads nothing of it."""
    with open_server() as server:

        def impostor() -> None:
            with server.accept()[0] as connection:
                connection.sendall(bytes(32))
                connection.recv(HELLO_BYTES)
                connection.sendall(bytes(32))
                time.sleep(0.2)

        threading.Thread(target=impostor).start()
        with socket.create_connection(server.getsockname()) as connection:
            deadline = time.monotonic() + PATIENCE
            with pytest.raises(HandshakeError, match="does not know this job"):
                introduce(connection, new_secret(), rank=1, deadline=deadline)


def test_an_answer_cannot_be_reflected():
    """What a rank proves is not what rank 0 proves."""
    answer, expected = hello(b"secret", bytes(32), rank=1)
    assert not answer.endswith(expected)
