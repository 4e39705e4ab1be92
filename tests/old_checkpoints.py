"""Checkpoints as version 0.1 wrote them, which are still read."""

import json
from pathlib import Path


def as_of_version_0_1(run_dir: Path) -> None:
    """Take the checksums away from all checkpoints of a run, and the count of tokens."""
    for file in run_dir.glob("checkpoints/step_*/checkpoint.json"):
        (file.parent / "CHECKSUMS").unlink(missing_ok=True)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokens": None}))
