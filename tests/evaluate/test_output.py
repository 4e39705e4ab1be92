"""What commands print is ours: progress bars of libraries do not leak into it."""

import os
import subprocess
import sys

import pytest
from judged import Judged

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("words", [("evaluate",), ("generate", "caf\u00e9")], ids=lambda w: w[0])
def test_nothing_of_the_libraries_is_printed(judged: Judged, words: tuple[str, ...]):
    """Both load a model with transformers, which draws "Loading weights" on standard error."""
    command, *arguments = words
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_moe", command, str(judged.run), *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout
    for mark in ("\r", "%|", "it/s", "Loading weights", "Writing model shards"):
        assert mark not in done.stdout
