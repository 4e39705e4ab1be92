"""Faults that are tests of their own: they need SLURM, or several restarts of one job.

Such a test compares the losses itself. Into its report it puts what the operator saw, the steps
that were repeated, and the seconds from the fault to the first new step (tests/recovery.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from chaos_table import Outcome

ROOT = Path(__file__).resolve().parents[2]
_SLURM = "tests/slurm/test_slurm.py::test_"
_APART = "tests/slurm/test_slurm_hosts.py::test_"
_NODES = "tests/launch/test_nodes.py::test_"
_ELASTIC = "tests/launch/test_elastic.py::test_"
_DISK = "tests/reliability/test_disk.py::test_"


@dataclass(frozen=True, slots=True)
class Tested:
    """A row of the table that a test fills.

    Args:
        name: The fault.
        test: The test, as pytest calls it.
        only: Words by which pytest chooses among its parameters; none: all of them.
    """

    name: str
    test: str
    only: str = ""

    def outcome(self) -> Outcome:
        """Run the test, and return the row."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            words = [
                self.test,
                "-q",
                f"--junitxml={report}",
                *(["-k", self.only] * bool(self.only)),
            ]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *words],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if not report.exists():
                print(done.stdout + done.stderr, file=sys.stderr)
                return Outcome(self.name, "", None, None, None, "pytest failed")
            return read_report(self.name, report)


def read_report(name: str, report: Path) -> Outcome:
    """Return the row of a test from pytest's report of it."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    for kind in ("failure", "error"):
        for case in cases:
            if (problem := case.find(kind)) is not None:
                print(problem.text, file=sys.stderr)
                reason = (problem.get("message") or kind).splitlines()[0]
                return Outcome(name, "", None, None, None, reason[:80])
    if not cases:
        return Outcome(name, "", None, None, None, "no such test")
    skipped = [case.find("skipped") for case in cases]
    if all(reason is not None for reason in skipped):
        reasons = [str(reason.get("message")) for reason in skipped if reason is not None]
        return Outcome(
            name, "", None, None, None, skipped=reasons[0] if reasons else "no such test"
        )
    told: dict[str, str] = {}
    for case in reversed(cases):  # the first one counts
        told |= {str(p.get("name")): str(p.get("value")) for p in case.iter("property")}
    again, seconds = told.get("steps_again"), told.get("recover_seconds")
    return Outcome(
        name,
        told.get("saw", ""),
        None,
        None if again is None else int(again),
        None if seconds is None else float(seconds),
    )


TESTED = (
    Tested("SLURM: out of time", f"{_SLURM}out_of_time_saves_requeues_and_resumes"),
    Tested("SLURM: preempted", f"{_SLURM}a_preempted_job_saves_and_resumes"),
    Tested("SLURM: a node is lost", f"{_SLURM}a_lost_node_requeues_the_job"),
    Tested("SLURM: cancelled", f"{_SLURM}a_cancelled_job_ends_and_its_successor_resumes"),
    Tested(
        "SLURM, nodes as hosts: the link is cut in forward, and returns",
        f"{_APART}a_cut_link_requeues_the_job",
    ),
    Tested(
        "SLURM, nodes as hosts: a host vanishes in forward, and returns",
        f"{_APART}a_vanished_host_requeues_the_job",
    ),
    Tested("launch/nodes.sh: clocks an hour apart", f"{_NODES}clocks_may_be_an_hour_apart"),
    Tested(
        "launch/nodes.sh: a host does not know its name", f"{_NODES}an_unknown_own_name_is_refused"
    ),
    Tested(
        "NNODES=2:3: the host of rank 0 vanishes, and returns",
        f"{_ELASTIC}the_host_of_rank_0_is_lost_and_returns",
    ),
    Tested("NNODES=1:2: a host gets SIGTERM", f"{_ELASTIC}a_host_is_stopped", "SIGTERM"),
    Tested("NNODES=1:2: torchrun is killed on a host", f"{_ELASTIC}a_host_is_stopped", "SIGKILL"),
    Tested(
        "NNODES=1:2: the host of MASTER_ADDR vanishes",
        f"{_ELASTIC}the_host_that_keeps_the_rendezvous_is_lost",
    ),
    Tested("disk full at each command that writes", f"{_DISK}a_disk_that_takes_nothing", "fill"),
    Tested("no inodes left for commands that write", f"{_DISK}a_disk_that_takes_nothing", "inodes"),
    Tested(
        "read-only disk for commands that write", f"{_DISK}a_disk_that_takes_nothing", "read_only"
    ),
    Tested("disk of local copies full", f"{_DISK}local_copies_on_a_full_disk"),
)
