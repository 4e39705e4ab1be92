"""Tests that checkpoint files follow the umask and are fsynced before they are published."""

import os
import stat
from pathlib import Path

import pytest
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

pytestmark = pytest.mark.distributed


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return tree(
        tmp_path / "run", save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens"),
        train={"steps": 2}, checkpoint={"interval": 1}, parallel={"expert_parallel_size": 2},
    )  # fmt: skip


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=["022", "077"])
def test_the_users_umask_decides_who_reads_a_run(settings: dict, umask: int):
    before = os.umask(umask)
    try:
        run_training(settings, world_size=2)
    finally:
        os.umask(before)
    paths = sorted(Path(settings["run"]["dir"]).rglob("*"))
    assert any(path.suffix == ".distcp" for path in paths)
    for path in paths:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


def test_everything_is_on_the_disk_before_it_counts(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A power cut between any two system calls leaves a complete checkpoint or none."""
    log = tmp_path / "log"
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    def logged_fsync(descriptor: int) -> None:
        note(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink()}")
        fsync(descriptor)

    def logged_rename(path: Path, target: Path) -> Path:
        inside = [str(child) for child in path.rglob("*")]
        note(f"rename {path} {' '.join(inside)}")
        return rename(path, target)

    def logged_replace(path: Path, target: Path) -> Path:
        note(f"replace {path}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(Path, "replace", logged_replace)
    run_training(settings, world_size=2)

    on_disk: set[str] = set()
    events = [line.split() for line in log.read_text().splitlines()]
    renames = 0
    for kind, *paths in events:
        if kind == "fsync":
            on_disk.add(paths[0])
        elif Path(paths[0]).parent.name == "checkpoints":
            assert set(paths) <= on_disk, (kind, set(paths) - on_disk)
            on_disk -= set(paths)
            renames += kind == "rename"
    assert renames == 2
    checkpoints = str(Path(settings["run"]["dir"]) / "checkpoints")
    assert events[-1] == ["fsync", checkpoints]
