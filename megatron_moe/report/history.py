"""metrics.jsonl as columns: each step once, in order, whatever was resumed or rolled back.

Shape letters of this module:

    S  steps   L  MoE layers   E  experts
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.errors import DataError

Numbers = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One value at some steps."""

    steps: NDArray[np.int64]
    values: Array
    """``(S,)``, or ``(S, L)`` and ``(S, L, E)`` for lists; NaN where a value was not finite."""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class History:
    """All that a run logged."""

    lines: list[Numbers] = field(default_factory=list)
    """One a step, ascending."""
    damaged: int = 0
    """Lines that were no JSON; the last of a run that was killed may be one."""

    @property
    def last_step(self) -> int:
        """Where the run is."""
        return self.lines[-1]["step"] if self.lines else 0

    def names(self, prefix: str = "") -> list[str]:
        """Values whose names begin so, in the order they appeared."""
        found = {name: None for line in self.lines for name in line if name.startswith(prefix)}
        return list(found)

    def series(self, name: str) -> Series | None:
        """The steps that told ``name``; None where none told a finite number.

        A list of another length than the last one is of another model: its step is left out.

        Raises:
            DataError: One is neither a number nor a list of them.
        """
        told = [(line["step"], _array(line, name)) for line in self.lines if name in line]
        told = [(step, value) for step, value in told if value.shape == told[-1][1].shape]
        if not told or not any(np.isfinite(value).any() for _, value in told):
            return None
        return Series(np.array([step for step, _ in told]), np.stack([value for _, value in told]))


def _array(line: Numbers, name: str) -> Array:
    try:
        return np.array(line[name], dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise DataError(f"metrics.jsonl, step {line['step']}: {name} is no number") from error


def read_history(path: Path) -> History:
    """The history of a run; empty where there is no file.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return History()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    parsed = [_parse(line) for line in lines if line.strip()]
    good = [line for line in parsed if line is not None]
    return History(list(kept(good)), damaged=len(parsed) - len(good))


def kept(lines: Iterable[Numbers]) -> Iterator[Numbers]:
    """The lines that count: a step that comes again undoes itself and all after it.

    >>> [line["loss"] for line in kept({"step": s, "loss": l} for s, l in
    ...     [(1, "a"), (2, "b"), (3, "c"), (2, "d")])]
    ['a', 'd']
    """
    stack: list[Numbers] = []
    for line in lines:
        while stack and stack[-1]["step"] >= line["step"]:
            stack.pop()
        stack.append(line)
    return iter(stack)


def _parse(line: str) -> Numbers | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and isinstance(found.get("step"), int)
    return found if whole else None
