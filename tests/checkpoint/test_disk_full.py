"""Tests that a full disk is reported in words, by the rank that met it, and that no tensor is lost.

The disk is a tmpfs of one MiB, which root can mount.
"""

import os
import subprocess
from collections.abc import Iterator
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_moe.checkpoint.boxes import Box
from megatron_moe.checkpoint.storage import read_boxes, write_boxes
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.disk import refusal
from megatron_moe.runtime.world import World


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    ):
        pytest.skip("needs root, to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.distributed
def test_a_tensor_that_does_not_fit_fails_the_save(small_disk: Path):
    """Two threads write a file each. The disk has room for one of them only."""
    run_on_ranks(_saves, small_disk, world_size=1)


def _saves(world: World, disk: Path) -> None:
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    boxes = {
        name: [Box((0,), torch.arange(count, dtype=torch.float32), (count,))]
        for name, count in (("small", 50_000), ("large", 500_000))
    }
    with pytest.raises(CheckpointError) as error:
        write_boxes(boxes, disk, group)
    assert f"rank 0: no space left on the disk of {disk}: 2.1 MiB needed, " in str(error.value)
    assert "RuntimeError" not in str(error.value)
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    write_boxes(boxes, disk, group)
    boxes["large"][0].tensor.zero_()
    read_boxes(boxes, disk, group)
    assert torch.equal(boxes["large"][0].tensor, torch.arange(500_000, dtype=torch.float32))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (EROFS, "the file system is mounted read-only (/data/run)"),
        (EDQUOT, "the quota is used up (/data/run)"),
        (EIO, "the device reports an input/output error (/data/run)"),
        (9999, "Unknown error 9999 (/data/run)"),
    ],
)
def test_a_refusal_is_in_words(number: int, words: str):
    assert refusal(OSError(number, os.strerror(number)), Path("/data/run")) == words


def test_a_full_disk_says_how_much_is_free(tmp_path: Path):
    text = refusal(OSError(ENOSPC, ""), tmp_path / "absent", needed=2**50)
    assert text.startswith(
        f"no space left on the disk of {tmp_path}/absent: {2**20}.0 GiB needed, "
    )
    assert text.endswith("iB free")
