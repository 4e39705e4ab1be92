"""Every command that writes: on a full, a read-only or an inode-less disk it fails in words.

The disks are tmpfs mounts of their own. Nothing that a reader would take for a whole file is left.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny import save_dense, save_tokenizer
from training_runs import run_training, tree, write_tokens

pytestmark = pytest.mark.distributed
KIB = 1024


class Disk:
    """A tmpfs with some free space, which a test takes away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path))

    def _mount(self, *words: str) -> None:
        done = subprocess.run(["mount", *words], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("needs root and tmpfs")

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file:
            chunk = b"x" * 4 * KIB
            while True:
                try:
                    file.write(chunk)
                except OSError:
                    return

    def take_inodes(self) -> None:
        used = os.statvfs(self.path)
        self._mount("-o", f"remount,nr_inodes={used.f_files - used.f_ffree}", str(self.path))

    def read_only(self) -> None:
        self._mount("-o", "remount,ro", str(self.path))

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.path], capture_output=True, check=False)


FULL = (Disk.fill, r"no space left on the disk of \S+/disk/\S+: .*0\.0 MiB free")
NO_INODES = (Disk.take_inodes, r"no space left on the disk of \S+/disk/")
READ_ONLY = (Disk.read_only, "read-only")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, text, and a configuration of a run that has one checkpoint."""
    root = tmp_path_factory.mktemp("source")
    text = root / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 2000)
    save_dense(root / "dense")
    save_tokenizer(root / "dense", [text])
    write_tokens(root / "tokens")
    settings = tree(
        root / "run", root / "dense", root / "tokens", train={"steps": 2},
        data={"validation_path": str(root / "tokens"), "validation_samples": 2},
    )  # fmt: skip
    run_training(settings, world_size=1)
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture
def disk(tmp_path: Path, source: Path) -> Iterator[Disk]:
    """Return a disk that holds a copy of the run."""
    disk = Disk(tmp_path / "disk")
    subprocess.run(["cp", "-r", source / "run", disk.path / "run"], check=True)
    (disk.path / "out").mkdir()
    yield disk
    disk.unmount()


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_moe", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "report": lambda disk, _: ("report", disk / "run"),
    "analyze": lambda disk, _: ("analyze", disk / "run"),
    "export": lambda disk, _: ("export", disk / "run", "--out", disk / "out" / "hf"),
    "tokenize": lambda disk, source: (
        "tokenize", source / "text.jsonl", "--tokenizer", source / "dense",
        "--out", disk / "out" / "tokens",
    ),
    "construct": lambda disk, source: (
        "construct", source / "run.yaml", "upcycle.method=split_coactivation",
        "moe.moe_ffn_hidden_size=24", f"upcycle.plan={disk / 'out' / 'plan.safetensors'}",
        "measure.samples=2", f"run.dir={disk / 'out' / 'run'}",
    ),
    "train": lambda disk, source: (
        "train", source / "run.yaml", f"run.dir={disk / 'out' / 'run'}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "state"),
    [
        *((name, FULL) for name in COMMANDS),
        ("report", NO_INODES), ("train", NO_INODES), ("export", READ_ONLY), ("train", READ_ONLY),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].__name__,
)  # fmt: skip
def test_a_disk_that_takes_nothing(
    disk: Disk, source: Path, name: str, state: tuple[Callable[[Disk], None], str]
):
    before = {path for path in disk.path.rglob("*") if path.is_file()}
    spoil, words = state
    spoil(disk)
    done = command(*COMMANDS[name](disk.path, source))
    assert done.returncode == 2, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert re.search(words, output), output
    assert "Traceback" not in output
    left = {path for path in disk.path.rglob("*") if path.is_file()} - before
    whole = [p for p in left if p.name != "filler" and p.stat().st_size and p.suffix != ".jsonl"]
    assert [p for p in whole if p.name not in ("run.id", "lock")] == []
