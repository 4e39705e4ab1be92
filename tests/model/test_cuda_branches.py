"""Tests that the torch engine's CUDA branches stay on the device and never wait for the GPU."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_cuda_branch_reads_a_value_or_mixes_devices():
    """See `fake_cuda`, which ends with a control that such a read raises an error."""
    script = Path(__file__).with_name("fake_cuda.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "DataDependentOutputException"
