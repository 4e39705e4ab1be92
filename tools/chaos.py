#!/usr/bin/env python3
"""Inject faults of clusters into training jobs, and report what was lost and how jobs recovered.

    tools/chaos.py            all faults; writes the table of docs/reliability.md
    tools/chaos.py --resume   the same, but keeps rows that were survived with this code
    tools/chaos.py WORD ...   only faults whose names contain all words; prints what the operator
                              saw, and writes nothing
    tools/chaos.py --list     prints the names

Each row is kept in build/chaos.json as soon as it is known. See `chaos_job` for what a row does.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import disks  # noqa: E402
import memory_groups  # noqa: E402
import torch  # noqa: E402
from chaos_job import RANKS, Stage, inject  # noqa: E402
from chaos_table import PAGE, Outcome, Results, write_page  # noqa: E402
from faults import rows  # noqa: E402
from faults.fault import Fault  # noqa: E402
from faults.tested import TESTED  # noqa: E402
from hosts import Hosts, missing  # noqa: E402

from megatron_moe.checkpoint.folder import complete  # noqa: E402
from megatron_moe.runtime import cpu  # noqa: E402

MANY_HOSTS = 4
MEMORY_BYTES = 3 * 2**30
"""Limit of the cgroup of a row: far more than its ranks need."""
RESULTS = ROOT / "build" / "chaos.json"


@dataclass(frozen=True, slots=True)
class Row:
    """A fault of the table, and how it is tried."""

    name: str
    attempt: Callable[[], Outcome]


def main() -> None:
    """Inject the faults that the arguments choose."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("words", nargs="*", metavar="WORD")
    arguments.add_argument("--resume", action="store_true")
    arguments.add_argument("--list", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    cpu.install()
    with all_rows() as table:
        chosen = [row for row in table if all(word in row.name for word in options.words)]
        names = [row.name for row in chosen]
        if options.list:
            print(*names, sep="\n")
        elif options.words:
            survived = [try_alone(row) for row in chosen]
            sys.exit(not all(survived))
        else:
            results = Results(RESULTS, resume=options.resume)
            try_all(chosen, results)
            write_page(results.of(names), results.code)
            print(f"wrote the table of {PAGE.relative_to(ROOT)}")
            failed = [name for name in names if not results.survived(name)]
            for name in failed:
                print(f"not survived: {name}; tools/chaos.py --resume runs it again")
            sys.exit(bool(failed))


@contextlib.contextmanager
def all_rows() -> Iterator[list[Row]]:
    """Yield the rows of the table; the hosts, disks and cgroups that they need exist inside."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        hosts = many = memory = None
        if missing() is None:
            hosts, many = (stack.enter_context(Hosts(n)) for n in (RANKS, MANY_HOSTS))
        if memory_groups.missing() is None:
            memory = stack.enter_context(memory_groups.limited_memory(MEMORY_BYTES))
        stage = Stage(folder, hosts)
        faults = [
            *rows.of_processes(RANKS),
            *rows.of_files(lambda run_dir: stage.job(run_dir, log_name="second").message),
            *([] if hosts is None else rows.of_hosts(hosts)),
            *rows.of_disks(lambda: size_of_a_checkpoint(stage)),
            *rows.of_memory(memory),
        ]
        table = [injected(stage, fault) for fault in faults]
        if many is not None:
            (folder / "many").mkdir()
            large = Stage(folder / "many", many, ranks=MANY_HOSTS)
            table += [injected(large, fault) for fault in rows.of_many_hosts(many)]
        table += [
            skipped(name, reason)
            for name, reason in (
                ("faults between hosts", missing()),
                ("faults of disks", disks.missing()),
                ("a rank exceeds the memory limit of a cgroup", memory_groups.missing()),
            )
            if reason is not None
        ]
        yield table + [Row(row.name, row.outcome) for row in TESTED]


def injected(stage: Stage, fault: Fault) -> Row:
    """Return the row of a fault that this process injects into a job."""
    return Row(fault.name, partial(inject_and_remove, stage, fault))


def skipped(name: str, reason: str) -> Row:
    """Return the row of faults that cannot be made on this machine."""
    return Row(name, lambda: Outcome(name, "", None, None, None, skipped=reason))


def size_of_a_checkpoint(stage: Stage) -> int:
    """Return the bytes of a checkpoint of the undisturbed run."""
    one = complete(stage.undisturbed)[0]
    return sum(file.stat().st_size for file in one.rglob("*") if file.is_file())


def try_all(table: list[Row], results: Results) -> None:
    """Inject the faults that have not been survived yet, and keep each outcome."""
    for number, row in enumerate(table, 1):
        if results.survived(row.name):
            continue
        outcome = tried(row)
        results.add(outcome)
        print(f"{number}/{len(table)} {in_words(outcome)}", flush=True)


def try_alone(row: Row) -> bool:
    """Inject a fault, print what the operator saw, and return whether it was survived."""
    outcome = tried(row)
    print(f"{in_words(outcome)}\n{outcome.message}\n", flush=True)
    return not outcome.problem


def in_words(outcome: Outcome) -> str:
    """Return a row as a line of the log."""
    if outcome.problem:
        return f"{outcome.fault}: NOT SURVIVED: {outcome.problem}"
    if outcome.skipped:
        return f"{outcome.fault}: skipped: {outcome.skipped}"
    if outcome.recover_seconds is None:
        return f"{outcome.fault}: survived"
    return (
        f"{outcome.fault}: {outcome.steps_again} steps repeated, "
        f"{outcome.recover_seconds:.1f} s to the first new step"
    )


def tried(row: Row) -> Outcome:
    """Return the outcome of a row; if a check or the harness fails, it says so, and prints why."""
    try:
        return row.attempt()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"{row.name}: {error}", file=sys.stderr, flush=True)
        problem = str(error).splitlines()[0] if str(error) else "a check failed"
        return Outcome(row.name, "", None, None, None, problem[:80])


def inject_and_remove(stage: Stage, fault: Fault) -> Outcome:
    """Inject a fault, and remove its run."""
    try:
        return inject(stage, fault)
    finally:
        shutil.rmtree(stage.root / re.sub(r"\W+", "-", fault.name), ignore_errors=True)


if __name__ == "__main__":
    main()
