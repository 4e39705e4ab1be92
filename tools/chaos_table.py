"""Results of ``make chaos``: a file that keeps each row as soon as it is known, and the table.

A row that failed, on a busy machine for example, is run again by ``tools/chaos.py --resume``; the
others are kept if they are from the same code. The page then says which rows needed another try.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_moe.hf.disk import write_text
from megatron_moe.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table by make chaos -->\n", "<!-- end of table -->\n"
TOTAL = re.compile(r"^\| faults, in the table below \|.*$", re.MULTILINE)
"""Line of the page's table of totals."""
LINE_CHARACTERS = 110
"""Upper bound for a message in the table; the whole one follows below it."""
CODE = ("megatron_moe", "tools", "tests")
"""Folders that decide what a row does."""
_START = r"\S+\.(sbatch|sh): \d+ ranks "
"""Beginning of what a launcher says before it starts the ranks."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table."""

    fault: str
    message: str
    ended_seconds: float | None
    """Seconds from the start of the job to its end; None if that says nothing."""
    steps_again: int | None
    """Number of steps that had to be repeated."""
    recover_seconds: float | None
    """Seconds from the restart to the first new step; from the fault, if a launcher restarts."""
    problem: str = ""
    """Why the fault was not survived."""
    skipped: str = ""
    """Why it was not tried on this machine."""

    @property
    def verdict(self) -> str:
        """Whether the resumed run is equal to the undisturbed one, in a word."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        return f"no: {self.problem}" if self.problem else "yes"

    @property
    def first_line(self) -> str:
        """First line that tells of the fault, without names of files and not too long for a table.

        A launcher says first how many ranks it starts; it may say nothing more.
        """
        lines = self.message.splitlines() or ["nothing"]
        line = next((one for one in lines if not re.match(_START, one)), lines[0])
        line = re.sub(r"[^\s(]+/([^\s/]+)", r"\1", line).replace("|", " ")
        return line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}..."


@dataclass(frozen=True, slots=True)
class Result:
    """The newest try of a row, and what is known about it."""

    outcome: Outcome
    ended_at: str
    """UTC time at which it ended."""
    load: float
    """Load average of the minute before."""
    failed_before: tuple[str, ...] = ()
    """Problems of earlier tries with the same code."""


class Results:
    """The results of all rows so far, in a file that is written after each row.

    Args:
        path: The file.
        resume: Keep its results, if they are from the same code.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path, self.code, self._rows = path, code_version(), dict[str, Result]()
        if resume and path.exists():
            stored = json.loads(path.read_text())
            if stored["code"] == self.code:
                self._rows = {name: _result(row) for name, row in stored["rows"].items()}

    def survived(self, fault: str) -> bool:
        """Return whether a row needs no further try."""
        return fault in self._rows and not self._rows[fault].outcome.problem

    def add(self, outcome: Outcome) -> None:
        """Take the result of a try, and write the file."""
        earlier = self._rows.get(outcome.fault)
        failed: tuple[str, ...] = ()
        if earlier is not None:
            failed = (*earlier.failed_before, *filter(None, [earlier.outcome.problem]))
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        self._rows[outcome.fault] = Result(outcome, now, os.getloadavg()[0], failed)
        rows = {name: asdict(result) for name, result in self._rows.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps({"code": self.code, "rows": rows}, indent=1) + "\n")

    def of(self, faults: list[str]) -> list[Result]:
        """Return the results of these rows, in order."""
        return [self._rows[fault] for fault in faults]


def _result(row: dict) -> Result:
    outcome = Outcome(**row["outcome"])
    return Result(outcome, row["ended_at"], row["load"], tuple(row["failed_before"]))


def code_version() -> str:
    """Return in words which code the rows are from."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words, "--", *CODE], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    commit = git("log", "-1", "--format=%h")
    if not commit:
        return "code outside of a repository"
    changed = " with uncommitted changes" if git("status", "--porcelain") else ""
    return f"the code of commit {commit}{changed}"


def write_page(results: list[Result], code: str) -> None:
    """Write the table, the messages, and the line of totals into the page."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    assert END in rest, f"{PAGE} has no place for the table"
    tried = [result for result in results if not result.outcome.skipped]
    survived = sum(not result.outcome.problem for result in tried)
    total = f"| faults, in the table below | {len(tried)} | {survived} | `make chaos` |"
    head, replaced = TOTAL.subn(total, head)
    assert replaced == 1, f"{PAGE} has no line for the number of faults"
    write_text(PAGE, head + BEGIN + table(results, code) + END + rest.partition(END)[2])


def table(results: list[Result], code: str) -> str:
    """Return the rows as Markdown, with what is known of their runs, followed by the messages."""
    head = (
        "fault", "the operator saw", "steps taken again", "job ended after (s)",
        "first new step after restart (s)", "equal to the undisturbed run",
    )  # fmt: skip
    outcomes = [result.outcome for result in results]
    cells = (
        (
            o.fault, o.first_line, "-" if o.steps_again is None else o.steps_again,
            _seconds(o.ended_seconds), _seconds(o.recover_seconds), o.verdict,
        )
        for o in outcomes
    )  # fmt: skip
    lines = [
        summary(results, code),
        "",
        markdown_table(head, cells),
        "What the operator saw, word for word:",
        "",
    ]
    for outcome in outcomes:
        lines += [outcome.fault, "", "```", outcome.message or "(nothing)", "```", ""]
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def summary(results: list[Result], code: str) -> str:
    """Return when, with which code and on what the rows were run, and which failed before."""
    times = sorted(result.ended_at for result in results)
    loads = [result.load for result in results]
    tried = [result for result in results if not result.outcome.skipped]
    survived = sum(not result.outcome.problem for result in tried)
    words = "all were" if survived == len(tried) else f"{survived} of them were"
    text = (
        f"{len(tried)} faults were injected from {times[0]} to {times[-1]} UTC with {code}, and "
        f"{words} survived: the resumed run is equal to the undisturbed one. {os.cpu_count()} "
        f"cores, load average {min(loads):.0f} to {max(loads):.0f}."
    )
    if len(tried) < len(results):
        text += f" {len(results) - len(tried)} rows were skipped here."
    again = [result for result in results if result.failed_before]
    if not again:
        return text
    named = "; ".join(f"{r.outcome.fault} ({', '.join(r.failed_before)})" for r in again)
    return f"{text} These rows had failed in an earlier try with the same code: {named}."
