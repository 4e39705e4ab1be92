#!/usr/bin/env python3
"""Check a GPU machine in under eight minutes: does everything work there, and how fast?

    python tools/gpu_check.py                      all checks on the first GPU
    python tools/gpu_check.py experts attention    some of them
    python tools/gpu_check.py --rehearse           the same code, small, on a CPU
    python tools/gpu_check.py --wheels             the packages that a bare machine lacks

Each check runs in a child process with a time limit. Results are kept as they come, so a check
that hangs or dies costs its own time and nothing else. Needs no installation: run it in the root of
the repository, with the missing wheels in PYTHONPATH (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu_checks.session import Session  # noqa: E402
from gpu_checks.table import CHECKS, PREPARE, Check  # noqa: E402

from megatron_moe.runtime.gpus import visible_gpus  # noqa: E402

COLUMNS = {"check": 10, "what": 44, "expected": 38, "measured": 46, "verdict": 8}
"""Names of the table's columns and their width in characters."""
REHEARSAL_PATIENCE = 40
"""Factor on time limits in a rehearsal: a CPU that others use too may take long."""
LAST_LINES = 12
"""Lines of a failed child's output that are kept."""


@dataclass(frozen=True, slots=True)
class CheckRun:
    """Result of a check that has ended."""

    name: str
    seconds: float
    results: list[dict[str, Any]]
    last_lines: list[str]
    """Last lines of the child's output, if it failed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks. Return 1 if one failed, 2 without a GPU, else 0; a missed target is 0."""
    args = _parser().parse_args(arguments)
    if args.wheels:
        from gpu_checks.wheels import missing_wheels

        print("\n".join(missing_wheels()))
        return 0
    if args.child:
        run_child(args.child, Session(args.name, args.folder, args.rehearse))
        return 0
    if not args.rehearse and not visible_gpus():
        print("gpu_check: torch sees no CUDA device. Use --rehearse to run small on the CPU.")
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        names, folder = args.checks or list(CHECKS), Path(name)
        record = run_checks(names, folder, rehearse=args.rehearse, out=args.json)
    print_figures(record["results"])
    return int(any(line["verdict"] == "FAIL" for line in record["results"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(["checks:", *(f"  {c.name:11}{c.about}" for c in CHECKS.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="all, if none is named")
    parser.add_argument("--rehearse", action="store_true", help="run small, on the CPU")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number to this file")
    parser.add_argument("--wheels", action="store_true", help="list wheels to bring, and stop")
    parser.add_argument("--child", metavar="FUNCTION", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def run_checks(
    names: list[str], folder: Path, *, rehearse: bool, out: Path | None
) -> dict[str, Any]:
    """Run the named checks one after the other; in a rehearsal two at a time, to save minutes.

    Args:
        names: Rows of `CHECKS`.
        folder: Empty scratch directory.
        rehearse: Run small, on the CPU.
        out: JSON file, written anew after every check, so that an interrupted run leaves one too.

    Returns:
        What the JSON file holds.
    """
    if unknown := [name for name in names if name not in CHECKS]:
        sys.exit(f"gpu_check: no such check: {', '.join(unknown)}; known: {', '.join(CHECKS)}")
    record: dict[str, Any] = {"machine": describe_machine(rehearse), "seconds": {}}
    (folder / "machine.json").write_text(json.dumps(record["machine"]))
    print(" | ".join(f"{name} {value}" for name, value in record["machine"].items()))
    print_row({name: name for name in COLUMNS})
    record["results"], start = [], time.monotonic()
    run = partial(run_check, folder=folder, rehearse=rehearse)
    checks = [CHECKS[name] for name in names]
    with ThreadPoolExecutor(2 if rehearse else 1) as pool:
        for run_of in chain([run(PREPARE)], pool.map(run, checks)):
            keep(run_of, record, out)
    print(f"{time.monotonic() - start:.0f} s: {record['seconds']}")
    return record


def keep(run_of: CheckRun, record: dict[str, Any], out: Path | None) -> None:
    """Print the results of a check and add them to the record, and to its file."""
    print("".join(f"    {line}\n" for line in run_of.last_lines), end="")
    for line in run_of.results:
        print_row(line)
    record["seconds"][run_of.name] = run_of.seconds
    record["results"] += run_of.results
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def run_check(check: Check, *, folder: Path, rehearse: bool) -> CheckRun:
    """Run one check in a child; one result more says so if the child failed."""
    start, output = time.monotonic(), folder / f"{check.name}.log"
    limit = check.limit * (REHEARSAL_PATIENCE if rehearse else 1)
    command = [
        sys.executable, __file__, "--child", check.function, "--name", check.name,
        "--folder", str(folder), *(["--rehearse"] if rehearse else []),
    ]  # fmt: skip
    with output.open("wb") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT
        )
        try:
            status = child.wait(timeout=limit)
            problem = f"the check ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit} s"
        finally:
            _kill_group(child)
    kept = Session(check.name, folder, rehearse).results
    text = kept.read_text(encoding="utf-8") if kept.exists() else ""
    results = [json.loads(line) for line in text.splitlines()]
    last = output.read_text(errors="replace").splitlines()[-LAST_LINES:] if problem else []
    if problem:
        results.append({
            "check": check.name, "what": "the check itself", "expected": f"{limit} s at most",
            "measured": problem, "verdict": "FAIL", "numbers": {"output": last},
        })  # fmt: skip
    return CheckRun(check.name, round(time.monotonic() - start, 1), results, last)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and every rank it has started: none may hold the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_child(function: str, session: Session) -> None:
    """Run a check, given as ``module:function``, in this process."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(session)


def describe_machine(rehearse: bool) -> dict[str, Any]:
    """Return date, commit, device and versions, asked in a process that then ends."""
    code = "from gpu_checks.machine import describe; import json; print(json.dumps(describe()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    if reported.returncode:
        sys.exit(f"gpu_check: cannot describe the machine:\n{reported.stderr}")
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "rehearsal": rehearse,
        **json.loads(reported.stdout.splitlines()[-1]),
    }


def print_row(line: dict[str, Any]) -> None:
    """Print a row of the table as soon as it is known."""
    cells = (str(line[name]).ljust(width) for name, width in COLUMNS.items())
    print(" ".join(cells).rstrip(), flush=True)


def print_figures(results: list[dict[str, Any]]) -> None:
    """Print the figures that matter beside their targets."""
    figures = [line for line in results if line["numbers"].get("figure")]
    if figures:
        print("\nThe figures that matter")
    for line in figures:
        reached = {"ok": "reached", "slow": "MISSED"}.get(line["verdict"], line["verdict"])
        print(f"  {line['what']}: {line['measured']} (target {line['expected']}): {reached}")


if __name__ == "__main__":
    sys.exit(main())
