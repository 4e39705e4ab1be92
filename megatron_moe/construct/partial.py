"""What a rank has measured so far, on disk: a killed `construct` goes on where it was.

folder/latest                  how many rounds are complete on all ranks, and the key
folder/<rounds>-<rank>.safetensors
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor


class PartialFiles:
    """One rank's files; all ranks save and restore together."""

    def __init__(self, folder: Path, key: str) -> None:
        """Files in ``folder`` that belong to the measuring that ``key`` names."""
        self._folder, self._key = folder, f"{key} on {dist.get_world_size()} ranks"

    def restore(self, tensors: Mapping[str, Tensor]) -> int:
        """Set ``tensors`` to what was kept; returns how many rounds that was, 0 for none."""
        pointer = self._folder / "latest"
        if not pointer.exists():
            return 0
        latest = json.loads(pointer.read_text())
        if latest["key"] != self._key:
            return 0
        kept = load_file(self._file(latest["rounds"]))
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
        return latest["rounds"]

    def save(self, tensors: Mapping[str, Tensor], rounds: int) -> None:
        """Keep ``tensors``; what was kept before goes once all ranks have."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), self._file(rounds))
        dist.barrier()
        if dist.get_rank() == 0:
            staged = self._folder / ".latest.partial"
            staged.write_text(json.dumps({"rounds": rounds, "key": self._key}))
            staged.replace(self._folder / "latest")
        dist.barrier()
        for old in self._folder.glob(f"*-{dist.get_rank()}.safetensors"):
            if old != self._file(rounds):
                old.unlink()

    def remove(self) -> None:
        """The measuring is done: nothing is kept."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, rounds: int) -> Path:
        return self._folder / f"{rounds}-{dist.get_rank()}.safetensors"
