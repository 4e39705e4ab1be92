"""Context of every check: the device, the sizes to use, and the file of results.

A result is one JSON line in a file, written as soon as it is known: what a check measured before it
hung or died is kept, and a forked rank reports in the same way as its parent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_moe.runtime.world import World, run_local_ranks

Verdict = Literal["ok", "FAIL", "slow", "skipped", "measured"]
"""slow: the numbers are right, but a target of speed or memory is missed. measured: nothing is
expected, or a rehearsal's speed means nothing."""


@dataclass(frozen=True, slots=True)
class Session:
    """One run of one check.

    Args:
        name: The check.
        folder: Scratch directory that all checks of a run share.
        rehearse: Run small, on the CPU.
    """

    name: str
    folder: Path
    rehearse: bool

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Device of the check."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def results(self) -> Path:
        """File of the check's JSON lines."""
        return self.folder / f"{self.name}.jsonl"

    def size[T](self, full: T, small: T) -> T:
        """Return the size for a GPU, or the one for a rehearsal."""
        return small if self.rehearse else full

    def add(
        self,
        what: str,
        measured: str,
        *,
        expected: str = "",
        verdict: Verdict = "measured",
        **numbers: Any,
    ) -> None:
        """Record one result.

        Args:
            what: What was measured; unique within the check.
            measured: The result as the table shows it.
            expected: The bound or target, as the table shows it.
            verdict: How the two compare.
            numbers: The result as the JSON file keeps it.
        """
        line = {
            "check": self.name, "what": what, "expected": expected, "measured": measured,
            "verdict": verdict, "numbers": numbers,
        }  # fmt: skip
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def skip(self, what: str, reason: str) -> None:
        """Record that something cannot run here."""
        self.add(what, reason, verdict="skipped")

    def target(self, reached: bool) -> Verdict:
        """Return the verdict on a target of speed or memory; a rehearsal's speed means nothing."""
        if self.rehearse:
            return "measured"
        return "ok" if reached else "slow"

    def on_rank(
        self, run: Callable[[World], None], device: Literal["cpu", "cuda"] | None = None
    ) -> None:
        """Run a function on one rank, as the package starts its local ranks."""
        run_local_ranks(run, ranks=1, device=device or self.device)


def passed(ok: bool) -> Verdict:
    """Return the verdict on a result that is either right or wrong."""
    return "ok" if ok else "FAIL"
