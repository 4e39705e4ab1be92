"""Does a thread wait for other ranks? Read from the line of Python that it executes."""

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

    On a CPU that is a call inside torch's collectives. On CUDA collectives return at once, and a
    rank waits where it next needs a number from the device: in a copy to the host, or when it
    synchronizes. A rank that is stuck anywhere else is then the one that the others wait for.

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
    """Return the source of the expression that the frame evaluates, or "" where it has none."""
    positions = frame.f_code.co_positions()
    first, last, begin, end = next(itertools.islice(positions, frame.f_lasti // 2, None))
    if first is None or last is None or begin is None or end is None:
        return ""
    lines = [
        linecache.getline(frame.f_code.co_filename, number) for number in range(first, last + 1)
    ]
    if not lines[-1]:
        return ""
    # Columns count bytes of UTF-8.
    encoded = [line.encode() for line in lines]
    encoded[-1] = encoded[-1][:end]
    encoded[0] = encoded[0][begin:]
    return b"".join(encoded).decode(errors="replace")
