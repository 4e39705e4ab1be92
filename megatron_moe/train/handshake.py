"""Let both ends of a connection prove that they know the job's secret, before anything else.

::

    rank 0 -> rank     challenge (32 random bytes)
    rank   -> rank 0   rank (4 bytes), challenge (32 random bytes), proof (32 bytes)
    rank 0 -> rank     proof (32 bytes)

A proof is the HMAC-SHA256 of both challenges and the rank. Challenges are drawn for each
connection, so a recorded connection cannot be replayed, and the two ends prove different texts, so
an answer cannot be sent back. All messages have a fixed length, and nothing is parsed before the
proof is checked.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time

CHALLENGE_BYTES = 32
PROOF_BYTES = 32
_RANK_BYTES = 4
HELLO_BYTES = _RANK_BYTES + CHALLENGE_BYTES + PROOF_BYTES
"""Length of a rank's only message before it is trusted."""


class HandshakeError(ConnectionError):
    """The other end closed the connection, or does not know the secret."""


def new_secret() -> bytes:
    """Return a secret for one job."""
    return secrets.token_bytes(32)


def new_challenge() -> bytes:
    """Return a challenge for one connection."""
    return secrets.token_bytes(CHALLENGE_BYTES)


def hello(secret: bytes, challenge: bytes, *, rank: int) -> tuple[bytes, bytes]:
    """Return a rank's answer to rank 0's challenge, and the proof that it expects in return."""
    said = rank.to_bytes(_RANK_BYTES) + new_challenge()
    return said + _proof(secret, b"rank", challenge + said), _proof(secret, b"0", challenge + said)


def check_hello(secret: bytes, challenge: bytes, answer: bytes) -> tuple[int, bytes] | None:
    """Return the rank of an answer and the proof to send back; None if its proof is wrong."""
    said, proof = answer[:-PROOF_BYTES], answer[-PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"rank", challenge + said)):
        return None
    return int.from_bytes(said[:_RANK_BYTES]), _proof(secret, b"0", challenge + said)


def introduce(connection: socket.socket, secret: bytes, *, rank: int, deadline: float) -> None:
    """Run the handshake as a rank, on a connection to what should be rank 0.

    Args:
        connection: A connected socket.
        secret: The job's secret.
        rank: This rank.
        deadline: Time of ``time.monotonic`` until which rank 0 must have answered.

    Raises:
        HandshakeError: The other end closed the connection or does not know the secret.
        TimeoutError: The deadline has passed.
    """
    answer, expected = hello(
        secret, _receive(connection, CHALLENGE_BYTES, deadline=deadline), rank=rank
    )
    connection.sendall(answer)
    if not hmac.compare_digest(_receive(connection, PROOF_BYTES, deadline=deadline), expected):
        raise HandshakeError("the process there does not know this job's secret")


def _proof(secret: bytes, role: bytes, text: bytes) -> bytes:
    return hmac.digest(secret, role + b":" + text, "sha256")


def _receive(connection: socket.socket, count: int, *, deadline: float) -> bytes:
    received = b""
    while len(received) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(count - len(received))
        if not part:
            raise HandshakeError("the connection was closed during the handshake")
        received += part
    return received
