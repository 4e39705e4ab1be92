"""A host that sees a checkpoint late waits for it; one that never sees it is named.

Each rank has a mount namespace of its own; a tmpfs over the checkpoints hides them from one rank.
"""

import ctypes
import os
import subprocess
import threading
from pathlib import Path

import pytest
from ranks import run_on_ranks

from megatron_moe.checkpoint import visible
from megatron_moe.errors import CheckpointError
from megatron_moe.runtime.world import World

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mount namespaces"),
]
UNTIL_SEEN_SECONDS = 2.0


def write_checkpoint(run: Path) -> Path:
    folder = run / "checkpoints" / "step_00000003"
    (folder / "source").mkdir(parents=True)
    for name in ("checkpoint.json", "__0_0.distcp", "source/config.json"):
        (folder / name).write_text(name)
    (folder.parent / "latest").write_text("step_00000003\n")
    return folder


def mount(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True)


def show(run: Path) -> None:
    (run / "shown").touch()
    mount("umount", "-l", run / "checkpoints")


def on_host(world: World, run: Path, seconds: float) -> None:
    """Hide all but ``latest`` from rank 1 for some seconds, and ask all ranks."""
    folder, local = run / "checkpoints", world.rank == 1
    if local:
        assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
        mount("mount", "--make-rprivate", "/")
        mount("mount", "-t", "tmpfs", "tmpfs", folder)
        (folder / "latest").write_text("step_00000003\n")
        timer = threading.Timer(seconds, show, [run])
        timer.daemon = True
        timer.start()
    own_host = World(world.rank, world.size, 0, world.device, world.address)
    newest = visible.agreed_newest(run, own_host)
    assert newest == run / "checkpoints" / "step_00000003"
    assert (newest / "source" / "config.json").read_text() == "source/config.json"
    assert (run / "shown").exists(), "the other rank waits too"


def test_a_host_that_sees_the_files_late_waits_for_them(tmp_path: Path):
    write_checkpoint(tmp_path)
    run_on_ranks(on_host, tmp_path, UNTIL_SEEN_SECONDS, world_size=2)


def test_a_host_that_never_sees_them_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path)
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 1.0)
    with pytest.raises(CheckpointError) as caught:
        run_on_ranks(on_host, tmp_path, 600.0, world_size=2)
    message = str(caught.value)
    assert message.startswith(f"{folder} must be visible on all hosts, but after 1 s files are ")
    assert f": rank 1 ({os.uname().nodename}): __0_0.distcp.\n  put run.dir on a file" in message


def ask(world: World, run: Path) -> None:
    assert visible.agreed_newest(run, world) is None


def test_no_checkpoint_is_none_and_a_wrong_name_ends_all_ranks(tmp_path: Path):
    run_on_ranks(ask, tmp_path, world_size=2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        run_on_ranks(ask, tmp_path, world_size=2)
