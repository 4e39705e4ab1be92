"""Shared parts of the benchmarks: machine, turns, spreads, results, progress."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from megatron_moe.bench.record import spread
from megatron_moe.hf.disk import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "megatron-core", "transformers")
GIB = 2**30


def machine() -> dict[str, Any]:
    """Return the conditions of a measurement: cores, their load, commit, versions, time."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load_before": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    try:
        return _git("rev-parse", "--short=10", "HEAD") + ("+" if _git("status", "-suno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def spread_of(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, p10 and p90 of what was measured, as the results keep them."""
    result = spread(list(values)).model_dump()
    return {name: float(f"{value:.{digits}g}") for name, value in result.items()}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the ratio of neighbours: both of a round saw the same machine."""
    return spread_of([a / b for a, b in zip(numerators, denominators, strict=True)])


def keep(name: str, cases: Mapping[str, Any], surroundings: Mapping[str, Any]) -> Path:
    """Put cases into bench/results/NAME.json beside those that are there already."""
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result |= {case: {**measured, "machine": surroundings} for case, measured in cases.items()}
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def say(text: str) -> None:
    """Progress, for who waits."""
    print(text, file=sys.stderr, flush=True)


def held_together(process: psutil.Popen) -> int:
    """Bytes of a process and all below it; what they share counts once."""
    held = 0
    for each in (process, *process.children(recursive=True)):
        try:
            held += each.memory_full_info().pss
        except psutil.Error:
            continue
    return held


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Seconds of the block, in the list, once it has ended."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)
