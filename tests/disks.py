"""Small disks of their own, which tests fill, break and repair. They need root.

A `ThinDisk` promises more than its storage has, as thin volumes and some network disks do: a write
goes to the page cache and succeeds, and fsync reports that there is no space.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

KIB = 1024


def missing() -> str | None:
    """Return why there can be no disks here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(tried, capture_output=True, check=False)
    return "needs tmpfs" if done.returncode else None


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def _output(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the disk is in use"
        time.sleep(0.1)


class Disk:
    """A tmpfs at a path, inside a ``with`` block."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def __enter__(self) -> Disk:
        self.path.mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", self.path)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.path], capture_output=True, check=False)

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            chunk = b"x" * 4 * KIB
            while True:
                try:
                    file.write(chunk)
                except OSError:
                    return

    def take_inodes(self) -> None:
        """Allow no more files than there are."""
        used = os.statvfs(self.path)
        _run("mount", "-o", f"remount,nr_inodes={used.f_files - used.f_ffree}", self.path)

    def read_only(self) -> None:
        """Mount it read-only, while no file on it is open for writing."""
        _run("mount", "-o", "remount,ro", self.path)

    def repair(self) -> None:
        """Make room for everything."""
        _run("mount", "-o", "remount,rw,size=1g,nr_inodes=100000", self.path)
        (self.path / "filler").unlink(missing_ok=True)


class ThinDisk:
    """An ext4 of 64 MiB at a path whose storage is smaller, inside a ``with`` block."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._storage = path, Disk(path.with_name(f"{path.name}-storage"), size)

    @property
    def _image(self) -> Path:
        return self._storage.path / "image"

    def __enter__(self) -> ThinDisk:
        self.path.mkdir(exist_ok=True)
        self._storage.__enter__()
        try:
            with self._image.open("wb") as file:
                file.truncate(64 * 2**20)
            _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", self._image)
            self._mount()
        except BaseException:
            self._storage.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.path], capture_output=True, check=False)
        self._storage.__exit__()

    def _mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", self._image, self.path)

    def fail(self) -> None:
        """Fail as after an error of the device: from now on it is read-only, open files too."""
        _run("mount", "-o", "remount,abort", self.path)

    def repair(self) -> None:
        """Give it the storage that it promises; unmount, check and mount it again."""
        self._storage.repair()
        _wait_for(lambda: not subprocess.run(["umount", self.path], check=False).returncode)
        # The loop device writes what it has cached when it is detached, a moment after umount. That
        # would damage the file system again after the check.
        _wait_for(lambda: not _output("losetup", "--associated", self._image))
        checked = subprocess.run(
            ["e2fsck", "-f", "-y", self._image], capture_output=True, check=False
        )
        assert checked.returncode < 4, checked.stdout  # 1: errors were corrected
        self._mount()
