"""Exchange messages with a process that has proven to belong to the job: one line of JSON each.

Buffers of both directions are bounded, and a message that cannot be read raises ValueError.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator

from megatron_moe.train.verdict import STAGES, Report

LINE_BYTES = 65536
"""Upper bound for a message; reports have a few hundred bytes."""
TEXT_CHARACTERS = 4096
"""Upper bound for the text of an error or verdict; four bytes a character fit into a line."""

Text = Annotated[str, StringConstraints(max_length=TEXT_CHARACTERS)]


class Message(BaseModel):
    """One message. Exactly one field is set."""

    model_config = ConfigDict(extra="forbid")

    report: Report | None = None
    """Progress of the rank that sends it; from rank 0, its own."""
    failed: Text | None = None
    """Error that the rank raised."""
    verdict: Text | None = None
    """Reason why rank 0 ends the job."""
    bye: bool = False
    """The sender is done, and no rank is lost."""

    @field_validator("report")
    @classmethod
    def _has_a_known_stage(cls, report: Report | None) -> Report | None:
        if report is not None and report.stage not in STAGES:
            raise ValueError("the stage is unknown")
        return report


class Channel:
    """Send and receive messages on a connected socket; any thread may send.

    Args:
        connection: Socket with a timeout, or a non-blocking one. The channel does not close it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread, self._unsent = bytearray(), bytearray()
        self._lock = threading.Lock()

    def send(self, message: Message, *, droppable: bool = False) -> None:
        """Send a message, or as much as the other end has room for; the rest follows later.

        Args:
            message: What to send.
            droppable: Drop the message if an earlier one is still waiting.
        """
        with self._lock:
            reads = len(self._unsent) <= LINE_BYTES and not (self._unsent and droppable)
            if reads:
                self._unsent += message.model_dump_json(exclude_defaults=True).encode() + b"\n"
            self._flush()

    def flush(self) -> None:
        """Send what earlier messages left over."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # full, or lost, which the reading thread notices
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]

    def receive(self) -> list[Message] | None:
        """Return the messages that arrived, maybe none; None if the other end closed.

        Raises:
            TimeoutError: Nothing arrived.
            BlockingIOError: The same on a non-blocking socket.
            ValueError: A message is too long or cannot be read.
        """
        try:
            received = self._connection.recv(LINE_BYTES)
        except ConnectionError:
            return None
        if not received:
            return None
        *lines, rest = (self._unread + received).split(b"\n")
        if len(rest) > LINE_BYTES:
            raise ValueError(f"a message has more than {LINE_BYTES} bytes")
        self._unread = rest
        try:
            return [Message.model_validate_json(line) for line in lines]
        except ValidationError as error:  # its own text has many lines
            raise ValueError(error.errors()[0]["msg"]) from None
