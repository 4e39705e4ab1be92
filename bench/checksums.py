#!/usr/bin/env python3
"""Seconds of a checkpoint's save and load with checksums, with torch's own CRC32, and with neither.

They take turns on one rank, so all see the same machine. torch computes the CRC32 as it writes, and
nothing checks it as it reads; our writer replaces it. A disk hides some of the cost behind its
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

ROUNDS, TENSORS, MIB_EACH = 21, 32, 16
WAYS = {"with checksums": "ours", "with torch's CRC32": "torch's", "without checksums": "bare"}
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
        ways = list(WAYS)[turn % 3 :] + list(WAYS)[: turn % 3]
        for way in ways:
            for name, value in _turn(boxes, folder, writer=WAYS[way]).items():
                if turn:  # the first warms up
                    seconds.setdefault(f"{name} {way}", []).append(value)
    measured: dict[str, Any] = {"gib": TENSORS * MIB_EACH / 1024, "rounds": ROUNDS}
    measured |= {f"{key}, seconds": spread_of(values) for key, values in seconds.items()}
    for name in ("save", "load", "save (processor)", "load (processor)"):
        with_ours, *others = (seconds[f"{name} {way}"] for way in WAYS)
        for way, other in zip(list(WAYS)[1:], others, strict=True):
            measured[f"{name}, ratio to {way}"] = ratios(with_ours, other)
    out.write_text(json.dumps(measured))


def _turn(boxes: Any, folder: Path, *, writer: str) -> dict[str, float]:
    """Save and load once, with one of `WAYS`."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from megatron_moe.checkpoint import storage
    from megatron_moe.hf.checksums import write_checksums

    target, group = folder / "checkpoint", dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    target.mkdir()
    start, busy = time.perf_counter(), time.process_time()
    if writer == "ours":
        write_checksums(target, storage.write_boxes(boxes, target, group))
    else:
        dcp.save(
            {}, storage_writer=_writer(target, bare=writer == "bare"),
            planner=storage._SavePlanner(boxes), process_group=group,
        )  # fmt: skip
    saved, busy_saved = time.perf_counter(), time.process_time()
    if writer == "ours":
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


def _writer(folder: Path, *, bare: bool) -> Any:
    """Return torch's writer, or ours without its checksums."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import FileSystem

    from megatron_moe.checkpoint.hashing import HashingWriter
    from megatron_moe.checkpoint.storage import _FILES_AT_ONCE

    class Bare(HashingWriter):
        def _checked(self, result: Any) -> Any:
            return result

        def finish(self, metadata: Any, results: Any) -> None:
            FileSystemWriter.finish(self, metadata, results)

    if not bare:
        return FileSystemWriter(folder, thread_count=_FILES_AT_ONCE)
    writer = Bare(folder, files_at_once=_FILES_AT_ONCE)
    writer.fs = FileSystem()
    return writer


if __name__ == "__main__":
    main()
