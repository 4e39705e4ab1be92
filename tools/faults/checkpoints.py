"""Damage to the newest checkpoint of an interrupted job."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

from faults.fault import Fault
from megatron_moe.checkpoint import folder


def truncated_shard() -> Fault:
    """Truncate a file of the newest checkpoint to half its size."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        shard = sorted(newest.glob("*.distcp"))[0]
        os.truncate(shard, shard.stat().st_size // 2)

    return Fault(name="newest checkpoint: a shard cut in half", damage=damage)


def flipped_bit(name: str) -> Fault:
    """Flip one bit in the middle of a file of the newest checkpoint."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)

    return Fault(name=f"newest checkpoint: a bit flipped in {name}", damage=damage)


def corrupted_index() -> Fault:
    """Overwrite 64 bytes of the newest checkpoint's index."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        index = bytearray((newest / ".metadata").read_bytes())
        middle = len(index) // 2
        index[middle : middle + 64] = os.urandom(64)
        (newest / ".metadata").write_bytes(bytes(index))

    return Fault(name="newest checkpoint: its index corrupted", damage=damage)


def index_that_names_code() -> Fault:
    """Replace the index by one that would run a command if it were unpickled.

    Without checksums: whoever writes such an index can write its checksum too.
    """

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        (newest / ".metadata").write_bytes(pickle.dumps(_Command(run_dir)))
        (newest / "CHECKSUMS").unlink()
        file = newest / "checkpoint.json"  # as version 0.1, which wrote no checksums
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokens": None}))

    return Fault(name="newest checkpoint: its index names code", damage=damage)


class _Command:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.run_dir}/executed",)
