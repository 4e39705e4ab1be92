"""Store partial measurements of each rank, so that a killed `construct` can resume.

folder/latest                        number of rounds completed on all ranks, and the key
folder/<rounds>-<rank>.safetensors   tensors of one rank
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_moe.hf.disk import replacing, write_text


class PartialFiles:
    """Partial files of one rank; all ranks must save and restore together."""

    def __init__(self, folder: Path, key: str) -> None:
        """Use the files in ``folder`` that belong to the measurement identified by ``key``."""
        self._folder, self._key = folder, f"{key} on {dist.get_world_size()} ranks"

    def restore(self, tensors: Mapping[str, Tensor]) -> int:
        """Restore ``tensors`` in place, and return the number of completed rounds, 0 if none."""
        pointer = self._folder / "latest"
        if not pointer.exists():
            return 0
        latest = json.loads(pointer.read_text())
        if latest["key"] != self._key:
            return 0
        saved = load_file(self._file(latest["rounds"]))
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        return latest["rounds"]

    def save(self, tensors: Mapping[str, Tensor], rounds: int) -> None:
        """Save ``tensors``, and delete the previous files when all ranks have saved."""
        file = self._file(rounds)
        with replacing(file) as staged:  # durable before `latest` names it
            save_file(dict(tensors), staged)
        dist.barrier()
        if dist.get_rank() == 0:
            latest = json.dumps({"rounds": rounds, "key": self._key})
            write_text(self._folder / "latest", latest)
        dist.barrier()
        for old in self._folder.glob(f"*-{dist.get_rank()}.safetensors"):
            if old != file:
                old.unlink()

    def remove(self) -> None:
        """Delete all files after the measurement."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, rounds: int) -> Path:
        return self._folder / f"{rounds}-{dist.get_rank()}.safetensors"
