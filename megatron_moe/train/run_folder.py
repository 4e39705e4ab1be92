"""Check that files and folders of a run are what they should be, before anything is computed.

People move and link parts of a run folder by hand. A folder in the place of a file would otherwise
end the job after the model was built, and a named pipe would block it forever.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_moe.regular_file import obstacle

_APPENDED = ("lock", "metrics.jsonl", "resumed.jsonl")
_FILES = (
    *_APPENDED, "config.yaml", "texts.json", "receipt.json", "plan.safetensors", "wandb_id",
    "mlflow_run_id",
)  # fmt: skip
_FOLDERS = ("checkpoints", "source", "tensorboard", "tokens")


def misplaced(run_dir: Path) -> str | None:
    """Return what is wrong with the first file or folder of a run that cannot be used, if any."""
    for names, folder in ((_FOLDERS, True), (_FILES, False)):
        expected = "a folder" if folder else "a file"
        for path in (run_dir / name for name in names):
            if (what := obstacle(path, folder=folder)) is not None:
                return (
                    f"{path} must be {expected} that the run writes, but is {what}.\n"
                    "  move it away, or set another run.dir"
                )
            written = os.W_OK if folder or path.name in _APPENDED else 0
            if path.exists() and not os.access(path, os.R_OK | written):
                return (
                    f"{path} must be {expected} that this user may read and write.\n"
                    "  change its owner or its mode, or set another run.dir"
                )
    return None
