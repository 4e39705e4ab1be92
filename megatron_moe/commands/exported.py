"""A run, a checkpoint or an export, as the folder that transformers loads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_moe.checkpoint.folder import find_checkpoint, read_progress
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.evaluate.harness import Exported


@contextlib.contextmanager
def exported(source: Path) -> Iterator[Exported]:
    """``source`` as a Hugging Face folder: itself, or an export that lasts as long as ``with``.

    Exports go where temporary files go: TMPDIR names a larger disk.

    Raises:
        CheckpointError: There is neither a folder with config.json nor a checkpoint, or no
            architecture of Hugging Face means the same as the model.
    """
    if (source / "config.json").exists():
        yield Exported(source, source, None, source / "evaluation")
        return
    checkpoint = find_checkpoint(source).resolve()
    step = read_progress(checkpoint).step
    with tempfile.TemporaryDirectory(prefix="megatron-moe-") as name:
        folder = Path(name) / "hf"
        export_checkpoint(checkpoint, folder)
        yield Exported(folder, checkpoint, step, checkpoint.parents[1] / "evaluation")
