"""Checks of tools/gpu_check.py that are right or wrong, run on a GPU with the torch engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    "check", ["join", "placement", "parity", "curves", "resume", "experts", "attention", "loss"]
)
def test_a_check_of_the_torch_engine(tmp_path: Path, check: str):
    out = tmp_path / "check.json"
    command = [sys.executable, "tools/gpu_check.py", check, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert json.loads(out.read_text())
