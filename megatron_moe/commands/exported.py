"""Provide a run, a checkpoint or an export as a folder that transformers can load."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_moe.checkpoint.folder import find_checkpoint, in_its_run, read_progress
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.evaluate.harness import Exported


@contextlib.contextmanager
def exported(source: Path) -> Iterator[Exported]:
    """Yield ``source`` if it is a Hugging Face folder, else a temporary export of it.

    The export is deleted at the end of the ``with`` block. It is written to the folder for
    temporary files; set TMPDIR to use a larger disk.

    Raises:
        CheckpointError: ``source`` is neither a folder with config.json nor a checkpoint, or no
            Hugging Face architecture is equivalent to the model.
    """
    if (source / "config.json").exists():
        yield Exported(source, source, None, source / "evaluation")
        return
    checkpoint = in_its_run(find_checkpoint(source))
    step = read_progress(checkpoint).step
    with tempfile.TemporaryDirectory(prefix="megatron-moe-") as name:
        folder = Path(name) / "hf"
        export_checkpoint(checkpoint, folder)
        yield Exported(folder, checkpoint, step, checkpoint.parents[1] / "evaluation")
