"""Tests of the environment variables that the program sets, and of unknown user ids."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_moe.runtime import environment

ROOT = Path(__file__).parents[2]
SHOW = """\
import json, os, sys
from megatron_moe.runtime import environment
assert "torch" not in sys.modules, "torch would have read the variables before they are set"
os.setgroups([])
os.setresuid({uid}, {uid}, {uid})  # after imports: others may not read this checkout
environment.prepare()
print(json.dumps({{"user": environment.user_name(), **os.environ}}))
"""


def environment_of(uid: int, **env: str) -> dict[str, str]:
    """Return the variables of a process of that user after `environment.prepare`."""
    result = subprocess.run(
        [sys.executable, "-c", SHOW.format(uid=uid)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **env},
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@needs_root
def test_a_command_by_hand_has_the_settings_of_cuda():
    result = environment_of(0, HOME="/root", NCCL_NVLS_ENABLE="1")
    settings = environment.CUDA | {"NCCL_NVLS_ENABLE": "1"}  # existing values are kept
    assert result.items() >= settings.items()
    assert not result.keys() & environment.CACHES.keys(), "root has a home"
    newer = environment_of(0, HOME="/root", PYTORCH_ALLOC_CONF="expandable_segments:False")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in newer


@needs_root
def test_any_user_id_has_a_name_and_folders_for_caches():
    """Simulate `docker run --user 12345`: no user name, and the home is the root folder."""
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # tmp_path belongs to one user only
    temporary.chmod(0o777)
    try:
        result = environment_of(12345, HOME="/", TMPDIR=str(temporary), HF_HOME="/models")
        own = temporary / "megatron-moe-12345"
        assert own.stat().st_uid == 12345
    finally:
        shutil.rmtree(temporary)
    assert result["user"] == "uid 12345"
    assert result["TRITON_CACHE_DIR"] == str(own / "triton")
    assert result["TORCHINDUCTOR_CACHE_DIR"] == str(own / "inductor")
    assert result["HF_HOME"] == "/models"


@needs_root
def test_a_folder_of_another_user_is_not_taken(tmp_path: Path):
    """Compiled kernels are executed from there."""
    (tmp_path / "megatron-moe-0").mkdir()
    os.chown(tmp_path / "megatron-moe-0", 12345, 12345)
    result = environment.cache_folders(tmp_path / "megatron-moe-0")["TRITON_CACHE_DIR"]
    assert Path(result).parent != tmp_path / "megatron-moe-0"
    assert Path(result).parent.stat().st_uid == 0


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch):
    for error in (KeyError("getpwuid(): uid not result: 7"), OSError("No username set")):

        def unknown(error: Exception = error) -> str:
            raise error

        monkeypatch.setattr("getpass.getuser", unknown)
        assert environment.user_name() == f"uid {os.getuid()}"
