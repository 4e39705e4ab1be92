"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, all real.

With `Hosts`, each node and the controller have a network of their own.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hosts import Hosts

NODES = ("n1", "n2")
CPUS_PER_NODE = 4
"""Number of CPUs of a node in SLURM's configuration, whatever this machine has."""
DEAD_AFTER_SECONDS = 10
"""Seconds without an answer after which a node is down and its jobs are requeued."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}({controller})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={root}/munge/socket
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={dead_after}
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,requeue_setup_env_fail
{nodes}
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Return the programs of a cluster that this machine does not have."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Cluster:
    """Start and stop daemons, submit jobs and wait for their states.

    Args:
        root: Folder for keys, logs and state. Unix sockets allow about 100 characters.
        hosts: One host for each node, and one for the controller; None: all share this machine's
            network.
    """

    def __init__(self, root: Path, hosts: Hosts | None = None) -> None:
        self.root, self.hosts = root, hosts
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._hurried: set[tuple[str, str]] = set()
        for name in ("munge", "state", *NODES):
            (root / name).mkdir()
        key = root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host, ports = os.uname().nodename.split(".")[0], _free_ports(1 + len(NODES))
        addresses = ["127.0.0.1"] * len(ports) if hosts is None else hosts.addresses
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} NodeHostname={host} Port={port} "
            f"CPUs={CPUS_PER_NODE}"
            for name, address, port in zip(NODES, addresses, ports[1:], strict=False)
        )
        (root / "slurm.conf").write_text(
            CONFIG.format(
                host=host, controller=addresses[-1], root=root, port=ports[0], nodes=nodes,
                dead_after=DEAD_AFTER_SECONDS,
            )
        )  # fmt: skip

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        munge = self.root / "munge"
        words = (f"--{name}={munge / file}" for name, file in (
            ("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"),
            ("log-file", "log"), ("seed-file", "seed"),
        ))  # fmt: skip
        self._start("munged", "munged", "--foreground", "--force", *words)
        wait_for(lambda: (munge / "socket").exists(), "munged", seconds=120)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for(self.idle, "idle nodes")

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything that it runs, as a power failure would."""
        daemon = self.daemons.pop(node)
        os.kill(daemon.pid, signal.SIGKILL)  # first, or it would report the end of its tasks
        daemon.wait()
        _kill_tasks(node)

    def stop(self) -> None:
        """Stop all daemons and kill what jobs have left running."""
        for node in NODES:
            _kill_tasks(node)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(timeout=120)

    def run(self, *words: str, **environment: str) -> str:
        """Run a SLURM command where the controller is, and return what it printed."""
        done = subprocess.run(
            self._there("slurmctld", *words),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def idle(self) -> bool:
        """Return whether all nodes are idle."""
        states = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        return states.split() == ["idle"] * len(NODES)

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``."""
        fields = re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number))
        return dict(fields)

    def wait_for_state(self, number: str, state: str, *, seconds: float = 120) -> None:
        """Wait until a job has this state."""
        wait_for(
            lambda: self.job(number)["JobState"] == state, f"job {number} {state}", seconds=seconds
        )

    def wait_for_end(self, number: str, *, seconds: float = 420) -> None:
        """Wait until a job is neither pending nor running, through all of its restarts."""
        wait_for(lambda: self._ended(number), f"end of job {number}", seconds=seconds)

    def _ended(self, number: str) -> bool:
        job = self.job(number)
        attempt = (number, job["Restarts"])
        waits = (job["JobState"], job["Reason"]) == ("PENDING", "BeginTime")
        if waits and attempt not in self._hurried:
            # SLURM delays a requeued job by two minutes. It needs a part of them: the order to end
            # the old attempt is repeated while a node does not answer, and ended a new attempt that
            # started after 15 seconds.
            self._hurried.add(attempt)
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+60seconds")
        return job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    def _there(self, name: str, *words: str) -> tuple[str, ...]:
        """Return the words of a command that runs on the host of a daemon."""
        if self.hosts is None or name == "munged":  # it listens at a path only
            return words
        host = NODES.index(name) if name in NODES else len(NODES)
        # Not `ip netns exec`, which mounts a /sys without the cgroups that slurmd needs.
        return ("nsenter", f"--net=/run/netns/{self.hosts.names[host]}", *words)

    def _start(self, name: str, *words: str) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                self._there(name, *words),
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


@contextmanager
def cluster(root: Path, hosts: Hosts | None = None) -> Iterator[Cluster]:
    """Yield a running cluster."""
    result = Cluster(root, hosts)
    try:
        result.start()
        yield result
    finally:
        result.stop()


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float = 120) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: It did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.25)


def _kill_tasks(node: str) -> None:
    """Kill the tasks of a node, which know its name, and SLURM's processes that started them."""
    tasks = [pid for pid in _processes() if f"SLURMD_NODENAME={node}" in _proc(pid, "environ")]
    starters = {pid for task in tasks if (pid := _parent(task)) and _is_starter(pid)}
    for pid in (*starters, *tasks):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _proc(pid: int, file: str) -> list[str]:
    """Return the NUL-separated words of a file of /proc, or none if the process has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace").split("\0")
    return []


def _parent(pid: int) -> int | None:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _is_starter(pid: int) -> bool:
    return _proc(pid, "cmdline")[:1] != [] and _proc(pid, "cmdline")[0].startswith("slurmstepd")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
