#!/usr/bin/env python3
"""Seconds of a checkpoint's save and load with checksums, beside torch's own writer and reader.

They take turns on one rank, so both see the same machine. A disk hides some of the cost behind its
writes; memory (/dev/shm) hides nothing. Seconds of the processor vary less than those of the clock
where other programs run.

    python bench/checksums.py              # into bench/results/checksums.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import keep, machine, ratios, say, spread_of

ROUNDS, TENSORS, MIB_EACH = 7, 32, 16
PLACES = {"disk": None, "memory": "/dev/shm"}


def main() -> None:
    """Measure in both places."""
    from megatron_moe.runtime.world import run_local_ranks

    surroundings = machine()
    cases: dict[str, Any] = {}
    for name, parent in PLACES.items():
        say(f"checksums: {name}")
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            out = Path(scratch) / "measured.json"
            run_local_ranks(
                lambda _, folder=Path(scratch), out=out: _measure(folder, out),
                ranks=1,
                device="cpu",
            )
            cases[name] = json.loads(out.read_text())
    keep("checksums", cases, surroundings)
    print(json.dumps(cases, indent=1))


def _measure(folder: Path, out: Path) -> None:
    import torch

    from megatron_moe.checkpoint.boxes import Box

    rows = MIB_EACH * 2**20 // 4 // 1024
    boxes = {f"t{i}": [Box((0, 0), torch.randn(rows, 1024), (rows, 1024))] for i in range(TENSORS)}
    seconds: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        with_first = turn % 2 == 0
        for checked in (with_first, not with_first):
            for name, value in _turn(boxes, folder, checked=checked).items():
                if turn:  # the first warms up
                    key = f"{name} {'with' if checked else 'without'} checksums"
                    seconds.setdefault(key, []).append(value)
    measured: dict[str, Any] = {"gib": TENSORS * MIB_EACH / 1024, "rounds": ROUNDS}
    measured |= {f"{key}, seconds": spread_of(values) for key, values in seconds.items()}
    for name in ("save", "load", "save (processor)", "load (processor)"):
        pair = (seconds[f"{name} with checksums"], seconds[f"{name} without checksums"])
        measured[f"{name}, ratio"] = ratios(*pair)
    out.write_text(json.dumps(measured))


def _turn(boxes: Any, folder: Path, *, checked: bool) -> dict[str, float]:
    """Save and load once; without checksums, with torch's own writer."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from megatron_moe.checkpoint import storage
    from megatron_moe.hf.checksums import write_checksums

    target, group = folder / "checkpoint", dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    target.mkdir()
    start, busy = time.perf_counter(), time.process_time()
    if checked:
        write_checksums(target, storage.write_boxes(boxes, target, group))
    else:
        writer = dcp.FileSystemWriter(target, thread_count=storage._FILES_AT_ONCE)
        dcp.save(
            {}, storage_writer=writer, planner=storage._SavePlanner(boxes), process_group=group
        )
    saved, busy_saved = time.perf_counter(), time.process_time()
    if checked:
        storage.read_boxes(boxes, target, group)
    else:
        reader = dcp.FileSystemReader(target)
        dcp.load(
            {}, storage_reader=reader, planner=storage._LoadPlanner(boxes), process_group=group
        )
    loaded, busy_loaded = time.perf_counter(), time.process_time()
    shutil.rmtree(target)
    return {
        "save": saved - start,
        "load": loaded - saved,
        "save (processor)": busy_saved - busy,
        "load (processor)": busy_loaded - busy_saved,
    }


if __name__ == "__main__":
    main()
