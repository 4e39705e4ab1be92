"""Attacks on the port of the watch, by strangers on real TCP connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_moe.train.channel import Channel, Message
from megatron_moe.train.handshake import HELLO_BYTES, HandshakeError, introduce, new_secret
from megatron_moe.train.monitor import UNPROVEN
from megatron_moe.train.port import connect
from megatron_moe.train.verdict import Report

MIB = 2**20
Address = tuple[str, int]
TLS_HELLO = bytes.fromhex("160301007a0100007603035f") + bytes(110)
HTTP = b"GET / HTTP/1.1\r\nHost: rank0\r\nUser-Agent: scanner\r\nAccept: */*\r\n\r\n"


@dataclass
class WatchPort:
    """The port, and what an eavesdropper needs: the connection of one rank, which it relays."""

    address: Address
    secret: bytes
    replayed_rank: int

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=120)


Attack = Callable[[WatchPort], int]
"""Returns the number of its connections."""


def read_all(connection: socket.socket) -> bytes:
    """Return what arrives until the other end closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(4096):
            received += part
    return received


def scan(watch: WatchPort) -> int:
    for _ in range(20):
        watch.stranger().close()
    aborted = watch.stranger()  # as a SYN scanner ends a connection: reset
    aborted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    aborted.close()
    return 21


def sends(text: bytes) -> Attack:
    def attack(watch: WatchPort) -> int:
        with watch.stranger() as stranger:
            with contextlib.suppress(OSError):  # refused before all was sent
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
            assert len(read_all(stranger)) <= 32, "only the challenge"
        return 1

    return attack


def floods(num_bytes: int) -> Attack:
    def attack(watch: WatchPort) -> int:
        with watch.stranger() as stranger, contextlib.suppress(ConnectionError):
            for _ in range(num_bytes // MIB):
                stranger.sendall(b"x" * MIB)
        return 1

    return attack


def connects(count: int) -> Attack:
    def attack(watch: WatchPort) -> int:
        with contextlib.ExitStack() as kept:
            for number in range(count):
                stranger = watch.stranger()
                if number < 400:  # as many stay open as this process may open
                    kept.enter_context(stranger)
                else:
                    stranger.close()
        return count

    return attack


def wrong_secret(watch: WatchPort) -> int:
    with watch.stranger() as stranger:
        try:
            introduce(stranger, new_secret(), rank=1, deadline=time.monotonic() + 120)
        except HandshakeError:
            return 1
    raise AssertionError("it was let in")


def lines_without_a_handshake(watch: WatchPort) -> int:
    return sends(Message(report=Report(1, 4, "data", moves=2)).model_dump_json().encode() + b"\n")(
        watch
    )


def replay(watch: WatchPort) -> int:
    """Record what a rank sends, and send it again on another connection."""
    recorded = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def relay() -> None:
            nonlocal recorded
            inner, _ = listener.accept()
            with inner, watch.stranger() as outer:
                inner.sendall(outer.recv(32))
                recorded = inner.recv(HELLO_BYTES)
                outer.sendall(recorded)
                inner.sendall(outer.recv(32))
                recorded += (line := inner.recv(4096))
                outer.sendall(line)
                time.sleep(0.1)

        thread = threading.Thread(target=relay)
        thread.start()
        with connect([address], watch.secret, rank=watch.replayed_rank) as connection:
            Channel(connection).send(Message(bye=True))
            thread.join()
    return sends(recorded)(watch)


def drips(watch: WatchPort) -> int:
    """Send a byte at a time on more connections than may wait for a proof."""
    count = UNPROVEN + 32
    with contextlib.ExitStack() as kept:
        strangers = [kept.enter_context(watch.stranger()) for _ in range(count)]
        for _ in range(20):
            for stranger in strangers:
                with contextlib.suppress(OSError):  # it is closed already
                    stranger.send(b"x")
            time.sleep(0.1)
    return count


ATTACKS: dict[str, Attack] = {
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
    "slow-senders": drips,
}
