#!/usr/bin/env python3
"""Run all benchmarks of `make bench` in turn, then write the tables of docs/performance.md.

Nothing else should run on the machine. One that fails does not keep the others from running.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from harness import say

HERE = Path(__file__).parent
STEPS = (
    ("communication.py",),
    ("startup.py",),
    ("upcycle.py",),
    ("growth.py",),
    ("construct.py",),
    ("step.py", "--record"),
    ("page.py",),
)


def main() -> None:
    """Run all; the exit status says whether all could."""
    start, failed = time.perf_counter(), []
    for number, (script, *arguments) in enumerate(STEPS, 1):
        minutes = (time.perf_counter() - start) / 60
        say(f"\n[{number}/{len(STEPS)}] bench/{script}, after {minutes:.1f} min")
        command = [sys.executable, str(HERE / script), *arguments]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            failed.append(script)
    say(f"\n{(time.perf_counter() - start) / 60:.1f} min")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
