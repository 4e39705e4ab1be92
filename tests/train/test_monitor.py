"""Tests of the watch's port: whatever strangers send to it, the ranks stay watched.

Strangers are real TCP connections. After each attack a rank is lost, and the other must be told.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from megatron_moe.train import monitor as monitors
from megatron_moe.train.channel import LINE_BYTES, Channel, Message
from megatron_moe.train.handshake import HELLO_BYTES, HandshakeError, hello, introduce, new_secret
from megatron_moe.train.monitor import UNPROVEN, Monitor
from megatron_moe.train.port import connect
from megatron_moe.train.verdict import Report

MIB = 2**20
Address = tuple[str, int]
TLS_HELLO = bytes.fromhex("160301007a0100007603035f") + bytes(110)
HTTP = b"GET / HTTP/1.1\r\nHost: rank0\r\nUser-Agent: scanner\r\nAccept: */*\r\n\r\n"


@dataclass
class Job:
    """A monitor and its ranks, without the ranks' processes."""

    address: Address
    secret: bytes
    said: list[str] = field(default_factory=list)
    ranks: dict[int, socket.socket] = field(default_factory=dict)

    def join(self, rank: int) -> Channel:
        connection = connect([self.address], self.secret, rank=rank)
        connection.settimeout(10)
        self.ranks[rank] = connection
        channel = Channel(connection)
        channel.send(Message(report=Report(rank, 3, "forward", moves=1)))
        return channel

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)


def open_server() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=4096)


@pytest.fixture
def job() -> Iterator[Job]:
    server, secret = open_server(), new_secret()
    it = Job(server.getsockname(), secret)
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


def read_all(connection: socket.socket) -> bytes:
    """Return what arrives until the other end closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(4096):
            received += part
    return received


def scan(job: Job) -> int:
    for _ in range(20):
        job.stranger().close()
    aborted = job.stranger()  # as a SYN scanner ends a connection: reset
    aborted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    aborted.close()
    return 21


def sends(text: bytes) -> Callable[[Job], int]:
    def attack(job: Job) -> int:
        with job.stranger() as stranger:
            with contextlib.suppress(OSError):  # refused before all was sent
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
            assert len(read_all(stranger)) <= 32, "only the challenge"
        return 1

    return attack


def floods(num_bytes: int) -> Callable[[Job], int]:
    def attack(job: Job) -> int:
        with job.stranger() as stranger, contextlib.suppress(ConnectionError):
            for _ in range(num_bytes // MIB):
                stranger.sendall(b"x" * MIB)
        return 1

    return attack


def connects(count: int) -> Callable[[Job], int]:
    def attack(job: Job) -> int:
        with contextlib.ExitStack() as kept:
            for number in range(count):
                stranger = job.stranger()
                if number < 400:  # as many stay open as this process may open
                    kept.enter_context(stranger)
                else:
                    stranger.close()
        return count

    return attack


def wrong_secret(job: Job) -> int:
    with pytest.raises(HandshakeError), job.stranger() as stranger:
        introduce(stranger, new_secret(), rank=1, deadline=time.monotonic() + 10)
    return 1


def lines_without_a_handshake(job: Job) -> int:
    return sends(Message(report=Report(1, 4, "data", moves=2)).model_dump_json().encode() + b"\n")(
        job
    )


def replay(job: Job) -> int:
    """Record what a rank sends, and send it again on another connection."""
    recorded = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def relay() -> None:
            nonlocal recorded
            inner, _ = listener.accept()
            with inner, job.stranger() as outer:
                inner.sendall(outer.recv(32))
                recorded = inner.recv(HELLO_BYTES)
                outer.sendall(recorded)
                inner.sendall(outer.recv(32))
                recorded += (line := inner.recv(4096))
                outer.sendall(line)
                time.sleep(0.1)

        thread = threading.Thread(target=relay)
        thread.start()
        with connect([address], job.secret, rank=2) as connection:
            Channel(connection).send(Message(bye=True))
            thread.join()
    return sends(recorded)(job)


ATTACKS = {
    "port-scan": scan,
    "http": sends(HTTP),
    "tls-hello": sends(TLS_HELLO),
    "json-that-is-none": sends(b'{"token": \n' * 10),
    "binary-line": sends(b"\xff\xfe\x00\n" * 100),
    "nested-json": sends(b"[" * 60000 + b"\n"),
    "lines-without-a-handshake": lines_without_a_handshake,
    "1-GiB-without-a-newline": floods(1024 * MIB),
    "10000-connections": connects(10_000),
    "wrong-secret": wrong_secret,
    "replay": replay,
}


def check_attack(job: Job, attack: Callable[[Job], int]) -> None:
    first, second = job.join(0), job.join(1)
    count = attack(job)
    time.sleep(0.3)  # for the last of them to be refused
    second.send(Message(report=Report(1, 5, "backward", moves=2)))
    time.sleep(0.2)
    job.ranks.pop(1).close()
    assert verdict_of(first).startswith("rank 1 died in the backward stage of step 5")
    refused = [line for line in job.said if line.startswith("Refused a connection from 127.0.0.1")]
    assert len(refused) == len(job.said) == 1, f"{count} strangers are logged once"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_ranks_stay_watched(job: Job, attack: Callable[[Job], int]):
    check_attack(job, attack)


@pytest.mark.parametrize("drip", [b"", b"x"], ids=["says-nothing", "a-byte-at-a-time"])
def test_a_slow_stranger_is_closed_in_time(job: Job, monkeypatch: pytest.MonkeyPatch, drip: bytes):
    monkeypatch.setattr(monitors, "HANDSHAKE_SECONDS", 1.0)
    first = job.join(0)
    start = time.monotonic()
    with job.stranger() as stranger:
        stranger.settimeout(0.1)
        closed = False
        while not closed and time.monotonic() < start + 10:
            with contextlib.suppress(TimeoutError):
                stranger.send(drip)
                closed = stranger.recv(64) == b""
    assert 1 <= time.monotonic() - start < 4, "limit, one tick, and slack"
    second = job.join(1)
    second.send(Message(failed="ValueError: reason"))
    assert "ValueError: reason" in verdict_of(first)


def test_connections_that_stay_open_are_bounded(job: Job):
    """Oldest are closed first, and ranks connect although strangers keep the port full."""
    strangers = [job.stranger() for _ in range(UNPROVEN + 3 + 40)]
    first = job.join(0)
    with contextlib.ExitStack() as kept:
        for stranger in strangers:
            kept.enter_context(stranger).settimeout(0.2)
        assert len(read_all(strangers[0])) == 32, "challenged and closed"
        assert len(strangers[-1].recv(64)) == 32
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
    start = time.monotonic()
    long = "x" * 4000
    for moves in range(2, 4000):  # 16 MB, more than a connection buffers
        first.send(Message(report=Report(0, 3, "forward", moves=moves, where=long)))
        first._connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            first.receive()
        first._connection.settimeout(10)
    first.send(Message(failed="ValueError: the end"))
    assert "ValueError: the end" in verdict_of(other)
    assert time.monotonic() - start < 20


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
            deadline = time.monotonic() + 10
            with pytest.raises(HandshakeError, match="does not know this job"):
                introduce(connection, new_secret(), rank=1, deadline=deadline)


def test_an_answer_cannot_be_reflected():
    """What a rank proves is not what rank 0 proves."""
    answer, expected = hello(b"secret", bytes(32), rank=1)
    assert not answer.endswith(expected)
