"""Find steps without a line in metrics.jsonl, and steps with several: what editing it leaves.

Imports no torch, so that `report` starts fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def missing_steps(steps: Sequence[int], *, last: int) -> str:
    """Return the steps up to ``last`` that have no line, in words; empty if there are none.

    The file may begin with any step: a run can be started from a checkpoint of another one.

    >>> missing_steps([8, 9, 11, 15], last=16)
    '10, 12 to 14, 16'
    """
    return _in_words(sorted(set(range(min(steps, default=last), last + 1)) - {*steps}))


def repeated_steps(steps: Iterable[int]) -> str:
    """Return the steps that have several lines, in words; empty if there are none."""
    return _in_words(sorted(step for step, lines in Counter(steps).items() if lines > 1))


def _in_words(steps: list[int]) -> str:
    """Return ascending steps as ranges."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][-1] == step - 1:
            ranges[-1][1:] = [step]
        else:
            ranges.append([step])
    return ", ".join(" to ".join(map(str, ends)) for ends in ranges)
