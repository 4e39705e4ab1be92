"""Files are replaced as a whole, durably, by one helper."""

import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_moe.hf import disk
from megatron_moe.hf.disk import replacing, write_text

PACKAGE = Path(__file__).parents[2] / "megatron_moe"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folder(tmp_path: Path):
    write_text(tmp_path / "new" / "file.json", "caf\u00e9\n")
    assert (tmp_path / "new" / "file.json").read_bytes() == b"caf\xc3\xa9\n"
    assert names(tmp_path / "new") == ["file.json"]


def write_half(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as staged:
        staged.write_text("half of the n")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with pytest.raises(error):
        write_half(tmp_path / "new" / "file", error)
    assert names(tmp_path) == ["file"], "the folder that was made for it is gone too"


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=["022", "077"])
def test_the_users_umask_decides_who_reads_a_file(tmp_path: Path, umask: int):
    """Whoever writes it: safetensors makes its files for their owner alone."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        with replacing(tmp_path / "tensors") as staged:
            save_file({"w": np.zeros(3)}, staged)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"text": 0o666 & ~umask, "tensors": 0o666 & ~umask}


def test_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, order = tmp_path / "file", []

    def watched(synced: Path) -> None:
        order.append((synced.read_text() if synced.is_file() else synced, path.exists()))

    monkeypatch.setattr(disk, "fsync", watched)
    write_text(path, "new")
    assert order == [("new", False), (tmp_path, True)]


def test_no_other_module_replaces_a_file_by_hand():
    """checkpoint/ publishes folders; tokens and their index are moved as a pair."""
    by_hand = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bos\.replace\(|\bstaged\.replace\(|\.partial\"", path.read_text())
    }
    others = {"checkpoint/folder.py", "checkpoint/local.py", "data/tokens.py", "data/writer.py"}
    assert by_hand - others == {"hf/disk.py"}
