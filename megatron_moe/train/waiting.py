"""Detect from a thread's stack frame whether it waits for other ranks."""

from __future__ import annotations

import itertools
import linecache
import re
from types import FrameType

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_SYNCHRONIZE = ("torch/cuda/__init__.py", "torch/cuda/streams.py")
_READS_DEVICE = re.compile(r"\.(item|tolist|cpu|synchronize|to|nonzero)\([^()]*\)$")
_CONVERTS = re.compile(r"(float|int|bool)\(")


def waits_for_ranks(frame: FrameType, *, cuda: bool) -> bool:
    """Return whether the innermost frame of a thread waits for other ranks.

    On a CPU, a waiting thread is inside one of torch's collectives. On CUDA collectives return
    immediately, and a rank waits when it next needs a number from the device: in a copy to the
    host or in a synchronization. A rank that is stuck anywhere else is the one the others wait for.

    Args:
        frame: Innermost frame of the thread.
        cuda: Whether the thread computes on CUDA.
    """
    file = frame.f_code.co_filename
    if file.endswith(_COLLECTIVES):
        return True
    if not cuda:
        return False
    if frame.f_code.co_name == "synchronize" and file.endswith(_SYNCHRONIZE):
        return True
    call = _call_of(frame)
    return _READS_DEVICE.search(call) is not None or _CONVERTS.match(call) is not None


def _call_of(frame: FrameType) -> str:
    """Return the source of the expression that the frame evaluates, or "" if it is unknown."""
    positions = frame.f_code.co_positions()
    first, last, begin, end = next(itertools.islice(positions, frame.f_lasti // 2, None))
    if first is None or last is None or begin is None or end is None:
        return ""
    lines = [
        linecache.getline(frame.f_code.co_filename, number) for number in range(first, last + 1)
    ]
    if not lines[-1]:
        return ""
    # Column offsets count UTF-8 bytes.
    encoded = [line.encode() for line in lines]
    encoded[-1] = encoded[-1][:end]
    encoded[0] = encoded[0][begin:]
    return b"".join(encoded).decode(errors="replace")
