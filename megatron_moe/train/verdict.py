"""What ranks report of themselves, and who is to blame when the job stands still. Pure.

A rank that waits for others looks as stuck as the one they wait for. The one to blame is the
furthest behind; of several there, those that are not inside a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGES = ("load", "data", "forward", "backward", "optimizer", "report", "validate", "save")
"""What a rank is doing, in the order of a step."""


@dataclass(frozen=True, slots=True)
class Report:
    """Where one rank's training thread is."""

    rank: int
    step: int
    """The step that is being taken, counted from 1; 0 while the model is loaded."""
    stage: str
    moves: int = 0
    """Grows with every stage the rank enters: whether it gets on."""
    where: str = ""
    """The line of Python it executes."""
    waiting: bool = False
    """Whether that line waits for other ranks."""

    @property
    def place(self) -> str:
        """Stage and step in words.

        >>> Report(rank=3, step=7, stage="backward").place
        'backward of step 7'
        """
        return f"{self.stage} of step {self.step}" if self.step else self.stage


def died(report: Report) -> str:
    """The verdict on a rank whose connection ended without a word."""
    return (
        f"rank {report.rank} died in {report.place}: killed, out of memory, or its machine is gone"
    )


def failed(report: Report, reason: str) -> str:
    """The verdict on a rank that raised."""
    return f"rank {report.rank} failed in {report.place}: {reason}"


def silent(report: Report, seconds: float) -> str:
    """The verdict on a rank that lives, as far as one can see, but says nothing."""
    return (
        f"rank {report.rank} has been silent for {seconds:.0f} s, last heard of in {report.place}: "
        "it is stopped, or its machine is cut off"
    )


def hung(reports: Mapping[int, Report], seconds: float) -> str:
    """The verdict when no rank has got on for so long: who holds the others up, and where."""
    behind = min(_progress(report) for report in reports.values())
    last = [report for report in reports.values() if _progress(report) == behind]
    blamed = [report for report in last if not report.waiting] or last
    places = "; ".join(
        f"rank {report.rank} hangs in {report.place} at {report.where}"
        for report in sorted(blamed, key=lambda report: report.rank)
    )
    return f"no rank has got on for {seconds:.0f} s: {places}"


def _progress(report: Report) -> tuple[int, int]:
    return report.step, STAGES.index(report.stage)
