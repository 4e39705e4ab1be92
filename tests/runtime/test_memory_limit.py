"""The limit of a cgroup: files of both versions, and a process that the kernel really kills."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_groups import limited_memory, missing

from megatron_moe.runtime.memory_limit import memory_limit

MIB = 2**20
# As the kernel writes them: version 2 of Linux 6.1 in a pod, version 1 of Linux 6.18.
EVENTS = "low 0\nhigh 0\nmax 37\noom 1\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_2(root: Path, kills: int = 0) -> None:
    write(root, "proc/self/cgroup", "0::/pod/container\n")
    write(root, "sys/fs/cgroup/pod/memory.max", f"{900 * MIB}\n")
    write(root, "sys/fs/cgroup/pod/memory.peak", f"{800 * MIB}\n")
    write(root, "sys/fs/cgroup/pod/memory.events", EVENTS.format(kills))
    write(root, "sys/fs/cgroup/pod/container/memory.max", "max\n")
    write(root, "sys/fs/cgroup/pod/container/memory.events", EVENTS.format(kills))


def version_1(root: Path, kills: int = 0) -> None:
    write(root, "proc/self/cgroup", "9:cpu:/\n4:memory:/job\n0::/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{900 * MIB}\n")
    write(root, "sys/fs/cgroup/memory/job/memory.max_usage_in_bytes", f"{800 * MIB}\n")
    write(root, "sys/fs/cgroup/memory/job/memory.oom_control", CONTROL.format(kills))


@pytest.mark.parametrize(
    ("version", "folder"),
    [(version_2, "sys/fs/cgroup/pod"), (version_1, "sys/fs/cgroup/memory/job")],
)
def test_both_versions_are_read(tmp_path: Path, version: Callable[..., None], folder: str):
    version(tmp_path)
    before = memory_limit(tmp_path)
    assert before is not None
    assert before.killed_since(before) is None
    version(tmp_path, kills=1)
    after = memory_limit(tmp_path)
    assert after is not None
    assert after.killed_since(before) == (
        "the kernel killed a process of this host because of a memory limit: "
        f"{tmp_path / folder} allows 900 MiB, and its processes have used 800 MiB"
    )
    assert after.killed_since(None) is None


@pytest.mark.parametrize(
    "groups", [None, "", "0::/\n", "4:memory:/\n0::/\n", "4:memory:/a:b/../c\n0::/\n"]
)
def test_a_process_without_a_limit(tmp_path: Path, groups: str | None):
    if groups is not None:
        write(tmp_path, "proc/self/cgroup", groups)
        write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit(tmp_path) is None


def test_a_file_that_cannot_be_parsed_is_no_limit(tmp_path: Path):
    version_2(tmp_path)
    write(tmp_path, "sys/fs/cgroup/pod/memory.events", "oom_kill")
    write(tmp_path, "sys/fs/cgroup/pod/container/memory.events", "oom_kill many")
    write(tmp_path, "sys/fs/cgroup/pod/memory.peak", "\xff")
    limit = memory_limit(tmp_path)
    assert limit is not None
    assert (limit.limit, limit.kills, limit.peak) == (900 * MIB, 0, None)


JOB = """
import os, signal, sys
from megatron_moe.runtime.memory_limit import memory_limit
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
before = memory_limit()
pid = os.fork()
if not pid:
    held = []
    while True:
        held.append(os.urandom(2**20))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
print(memory_limit().killed_since(before))
"""


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_process_that_the_kernel_kills(memory_group: Path):
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(memory_group)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == (
        f"the kernel killed a process of this host because of a memory limit: {memory_group} "
        "allows 100 MiB, and its processes have used 100 MiB\n"
    ), done.stderr


@pytest.fixture
def memory_group() -> Iterator[Path]:
    with limited_memory(100 * MIB) as folder:
        yield folder
