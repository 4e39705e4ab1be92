"""Reports of the ranks, and pure functions that name the rank that failed or hangs.

A rank that waits for others looks as stuck as the rank they wait for. The culprit is the rank that
is furthest behind; if several are equally far behind, those that are not inside a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGES = ("load", "data", "forward", "backward", "optimizer", "report", "validate", "save")
"""Stages of a rank, in the order of a step."""


@dataclass(frozen=True, slots=True)
class Report:
    """Current stage, step and line of one rank's training thread."""

    rank: int
    step: int
    """Current step, counted from 1; 0 while the model is loaded."""
    stage: str
    moves: int = 0
    """Number of stages entered so far; if it does not grow, the rank makes no progress."""
    where: str = ""
    """Line of Python that the thread executes."""
    waiting: bool = False
    """Whether that line waits for other ranks."""
    host: str = ""
    """Name of the rank's host; empty if all ranks are on one."""
    resident: int = 0
    """Host memory that the rank holds, in bytes; 0 if it is not known."""

    @property
    def name(self) -> str:
        """Rank and host in words.

        >>> Report(rank=3, step=7, stage="backward", host="node1").name
        'rank 3 on node1'
        """
        return f"rank {self.rank}" + (f" on {self.host}" if self.host else "")

    @property
    def location(self) -> str:
        """Stage and step in words.

        >>> Report(rank=3, step=7, stage="backward").location
        'the backward stage of step 7'
        """
        return f"the {self.stage} stage" + (f" of step {self.step}" if self.step else "")


def died(report: Report) -> str:
    """Return the message for a rank whose connection closed without ``bye``."""
    held = f". It held {report.resident / 2**20:.0f} MiB of host memory" if report.resident else ""
    return (
        f"{report.name} died in {report.location}: killed, out of memory, or its machine is gone"
        f"{held}"
    )


def failed(report: Report, reason: str) -> str:
    """Return the message for a rank that raised."""
    return f"{report.name} failed in {report.location}: {reason}"


def reason_of(error: BaseException) -> str:
    r"""Return the kind of an error and the first line of its text; some begin with empty lines.

    >>> reason_of(RuntimeError("\n\nconnection closed\nby peer"))
    'RuntimeError: connection closed'
    >>> reason_of(AssertionError())
    'AssertionError without a message'
    """
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{kind}: {lines[0]}" if lines else f"{kind} without a message"


def silent(report: Report, seconds: float) -> str:
    """Return the message for a rank whose connection is open but silent."""
    return (
        f"{report.name} has been silent for {seconds:.0f} s; its last report was from "
        f"{report.location}. The process is stopped, or {report.host or 'its machine'} is "
        "unreachable"
    )


def hung(reports: Mapping[int, Report], seconds: float) -> str:
    """Return the message for a job without progress for ``seconds``: which rank is stuck, where."""
    behind = min(_progress(report) for report in reports.values())
    last = [report for report in reports.values() if _progress(report) == behind]
    stuck = [report for report in last if not report.waiting] or last
    locations = "; ".join(
        f"{report.name} is stuck in {report.location} at {report.where}"
        for report in sorted(stuck, key=lambda report: report.rank)
    )
    return f"no rank has made progress for {seconds:.0f} s: {locations}"


def _progress(report: Report) -> tuple[int, int]:
    return report.step, STAGES.index(report.stage)
