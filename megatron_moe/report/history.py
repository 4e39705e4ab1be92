"""Read metrics.jsonl as series: each step once, in order, after resumes and rollbacks.

Shape letters of this module:

    S  steps   L  MoE layers   E  experts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.errors import DataError
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import obstacle
from megatron_moe.train.missing_steps import missing_steps

Numbers = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Values of one metric at some steps."""

    steps: NDArray[np.int64]
    values: Array
    """``(S,)``, or ``(S, L)`` or ``(S, L, E)`` for lists; NaN for values that were not finite."""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class History:
    """All metrics that a run logged."""

    lines: list[Numbers] = field(default_factory=list)
    """One entry per step, in ascending order."""
    damaged: int = 0
    """Number of lines that are not valid JSON, such as the last line of a killed run."""

    @property
    def last_step(self) -> int:
        """The last logged step, or 0."""
        return self.lines[-1]["step"] if self.lines else 0

    def missing(self, *, last: int) -> str:
        """Return the steps up to ``last`` without a line, in words; empty if there are none."""
        if not self.lines:
            return ""
        return missing_steps([line["step"] for line in self.lines], last=max(last, self.last_step))

    def names(self, prefix: str = "") -> list[str]:
        """Return the metrics whose names start with ``prefix``, in order of appearance."""
        names = {name: None for line in self.lines for name in line if name.startswith(prefix)}
        return list(names)

    def series(self, name: str) -> Series | None:
        """Return the logged values of ``name``, or None if none of them is finite.

        A list whose length differs from the last one belongs to another model; its step is skipped.

        Raises:
            DataError: A value is neither a number nor a list of numbers.
        """
        logged = [(line["step"], _array(line, name)) for line in self.lines if name in line]
        logged = [(step, value) for step, value in logged if value.shape == logged[-1][1].shape]
        if not logged or not any(np.isfinite(value).any() for _, value in logged):
            return None
        steps, values = zip(*logged, strict=True)
        return Series(np.array(steps), np.stack(values))

    def tables(self, name: str) -> list[tuple[int, Array]]:
        """Return the steps at which a table ``name`` was logged, and the tables, in order.

        Raises:
            DataError: A value is not a list of equally long lists of numbers.
        """
        logged = [(line["step"], _array(line, name)) for line in self.lines if name in line]
        for step, value in logged:
            if value.ndim != 2:
                raise DataError(f"metrics.jsonl, step {step}: {name} is not a table")
        return logged


def _array(line: Numbers, name: str) -> Array:
    try:
        return np.array(line[name], dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise DataError(f"metrics.jsonl, step {line['step']}: {name} is not a number") from error


def read_history(path: Path) -> History:
    """Read the history of a run; it is empty if the file does not exist.

    Raises:
        DataError: The file cannot be read.
    """
    if (what := obstacle(path)) is not None:
        raise DataError(f"{path} must be a file, but is {what}.\n  move it away")
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
    """Return the lines without rolled-back steps: a repeated step discards all from it on.

    If no step is repeated, nothing was rolled back, and the lines are only put in order.

    >>> [line["loss"] for line in kept({"step": s, "loss": l} for s, l in
    ...     [(1, "a"), (2, "b"), (3, "c"), (2, "d")])]
    ['a', 'd']
    """
    lines = list(lines)
    if len({line["step"] for line in lines}) == len(lines):
        return iter(sorted(lines, key=lambda line: line["step"]))
    stack: list[Numbers] = []
    for line in lines:
        while stack and stack[-1]["step"] >= line["step"]:
            stack.pop()
        stack.append(line)
    return iter(stack)


def _parse(line: str) -> Numbers | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    valid = isinstance(entry, dict) and isinstance(entry.get("step"), int)
    return _with_named_mfu(entry) if valid else None


def _with_named_mfu(entry: Numbers) -> Numbers:
    """Rename the MFU of version 0.1.0, which counted the whole square of the attention scores."""
    if "throughput/mfu" in entry and "throughput/mfu_full_attention" not in entry:
        entry["throughput/mfu_full_attention"] = entry.pop("throughput/mfu")
    return entry
