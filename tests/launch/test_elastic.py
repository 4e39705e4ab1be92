"""Hosts run launch/nodes.sh with NNODES=1:2 or 2:3; some are lost, are stopped, or return.

The hosts are network namespaces (tests/hosts.py). Steps after each restart must equal those of as
many local ranks that resume the same checkpoint.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from hosts import Hosts, missing
from recovery import Record, Recovery
from tiny import save_dense
from training_runs import read_metrics, tree, write_tokens

ROOT = Path(__file__).parents[2]
EXACT = ("step", "loss/lm", "grad_norm")
STEPS, INTERVAL = 16, 3
HANG_SECONDS = 30
"""More than a step takes while other programs use the cores too."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""A host would use all cores for its rank, and the order of sums depends on their number."""
DELAY_SECONDS = 0.01
"""Delay of each packet, so that steps take seconds and faults occur between two checkpoints."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


class Job:
    """A job with one rank per host, which may go on without one of the hosts.

    Args:
        hosts: The hosts.
        root: Folder for all files.
        keeper: Host that keeps the rendezvous. Ranks are in the order of the hosts' addresses.
    """

    def __init__(self, hosts: Hosts, root: Path, *, keeper: int) -> None:
        self.hosts, self.root, self.keeper, self.run_dir = hosts, root, keeper, root / "run"
        size = len(hosts.names)
        settings = tree(
            self.run_dir, save_dense(root / "dense"), write_tokens(root / "tokens"),
            train={"steps": STEPS, "global_batch_size": 6}, moe={"num_moe_experts": 6},
            parallel={"expert_parallel_size": size, "adapt_to_ranks": True},
            checkpoint={"interval": INTERVAL, "keep": STEPS}, guard={"hang_seconds": HANG_SECONDS},
        )  # fmt: skip
        self._config = root / "run.yaml"
        self._config.write_text(yaml.safe_dump(settings))
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        for host in range(size):
            self.start(host)
        self.wait_for_step(1)
        hosts.slow_down(DELAY_SECONDS, 0)

    def start(self, host: int) -> None:
        """Run launch/nodes.sh on a host."""
        size, addresses = len(self.hosts.names), self.hosts.addresses
        script = [ROOT / "launch" / "nodes.sh", self._config]
        with self._log(host).open("ab") as file:
            self._agents[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.hosts.names[host], *script],
                env={
                    **os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
                    "NNODES": f"{size - 1}:{size}", "MASTER_ADDR": addresses[self.keeper],
                    "NODE_ADDR": addresses[host], "RANKS": "1", "LAST_CALL": "5",
                    "GLOO_SOCKET_IFNAME": "eth0", **ONE_THREAD,
                },
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def signal(self, host: int, number: signal.Signals) -> None:
        """Send a signal to torchrun's agent on a host."""
        self._agents[host].send_signal(number)

    def vanish(self, host: int) -> None:
        """Cut a host off, and kill all of its processes."""
        self.hosts.cut(host)
        agent = psutil.Process(self._agents[host].pid)
        for process in [*agent.children(recursive=True), agent]:
            process.kill()
        self._agents[host].wait()

    def close(self) -> None:
        """End what is left of the job."""
        for host, agent in self._agents.items():
            if agent.poll() is None:
                self.vanish(host)

    def _log(self, host: int) -> Path:
        return self.root / f"host{host}.log"

    def log(self, host: int | None = None) -> str:
        """Return what a host, or all of them, have printed."""
        hosts = self._agents if host is None else [host]
        return "\n".join(f"--- host {h}\n{self._log(h).read_text()}" for h in hosts)

    def steps(self) -> list[list[object]]:
        """Return what must agree exactly, for each step taken."""
        return exact(self.run_dir)

    def recovery(self) -> Recovery:
        """Measure the recovery of the job from now on."""
        return Recovery(lambda: len(self.steps()) - 1, self.log)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is taken."""
        self.wait_for(lambda: len(self.steps()) > step)  # the first line is that of step 0

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (OSError, ValueError):  # no file yet, or half a line
                pass
            time.sleep(0.1)
        raise AssertionError(self.log())

    def wait_for_end(self, *hosts: int, code: int) -> None:
        """Wait until nodes.sh has ended on these hosts, with this exit status."""
        self.wait_for(lambda: all(self._agents[host].poll() is not None for host in hosts))
        assert {self._agents[host].returncode for host in hosts} == {code}, self.log()

    def resumed(self, ranks: int) -> int:
        """Return the step that this number of ranks has resumed."""
        start = rf"{ranks} ranks? on cpu(?:(?!ranks? on cpu)[\s\S])*?Resumed \S+ at step (\d+)"
        found = re.findall(start, self.log())
        assert found, self.log()
        return int(found[-1])

    def local(self, ranks: int, *, step: int) -> list[list[object]]:
        """Return the steps of local ranks that resume the checkpoint of a step, or start."""
        alone = self.root / f"alone-{ranks}-{step}"
        if step:
            kept = f"step_{step:08d}"
            folder = alone / "checkpoints"
            shutil.copytree(self.run_dir / "checkpoints" / kept, folder / kept)
            (folder / "latest").write_text(f"{kept}\n")
        words = ["train", self._config, f"run.dir={alone}", "--ranks", ranks]
        done = subprocess.run(
            [sys.executable, "-m", "megatron_moe", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return exact(alone)


def exact(run_dir: Path) -> list[list[object]]:
    return [[line.get(name) for name in EXACT] for line in read_metrics(run_dir)]


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Job]:
    """Return a job on as many hosts as the parameter says; the last but one is the keeper."""
    size: int = request.param
    with Hosts(size) as hosts:
        job = Job(hosts, tmp_path, keeper=size - 2)
        try:
            yield job
        finally:
            job.close()


@pytest.mark.parametrize("job", [3], indirect=True)
def test_the_host_of_rank_0_is_lost_and_returns(job: Job, record_property: Record):
    """Two hosts resume without it; when its command is run again, all three restart."""
    job.wait_for_step(INTERVAL + 1)
    recovery = job.recovery()
    job.vanish(0)
    job.wait_for(lambda: "Layout for 2 rank(s): parallel.expert_parallel_size=2" in job.log())
    job.wait_for(lambda: "Resumed" in job.log())
    lost = job.resumed(2)
    job.wait_for_step(lost + 2)
    job.hosts.cut(0, off=False)
    job.start(0)
    job.wait_for(lambda: re.search(r"3 ranks on cpu[\s\S]*Resumed", job.log(0)))
    job.hosts.heal()
    job.wait_for_end(0, 1, 2, code=0)
    returned = job.resumed(3)
    assert INTERVAL <= lost < returned < STEPS
    assert f"Stopped by a signal after step {returned}." in job.log(1), "it saved before"
    assert "rank 0 on " in job.log()
    assert f"has been silent for {HANG_SECONDS} s" in job.log()
    assert "Traceback" not in job.log()
    steps = job.steps()
    assert [step for step, *_ in steps] == [*range(STEPS + 1)]
    assert steps[: lost + 1] == job.local(3, step=0)[: lost + 1]
    assert steps[lost + 1 : returned + 1] == after(lost, job.local(2, step=lost))[: returned - lost]
    assert steps[returned + 1 :] == after(returned, job.local(3, step=returned))
    recovery.record(record_property)


def after(step: int, lines: list[list[object]]) -> list[list[object]]:
    """Return the lines of later steps."""
    return [line for line in lines if isinstance(line[0], int) and line[0] > step]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("job", [2], indirect=True)
def test_a_host_is_stopped(job: Job, number: signal.Signals, record_property: Record):
    """Its rank saves, as before a preemption or if torchrun's agent is killed; nothing is lost."""
    job.wait_for_step(INTERVAL + 1)
    recovery = job.recovery()
    job.signal(1, number)
    job.wait_for(lambda: re.search(r"1 ranks? on cpu[\s\S]*Resumed", job.log(0)))
    job.wait_for_end(0, code=0)
    stopped = job.resumed(1)
    assert stopped > INTERVAL
    assert f"Stopped by a signal after step {stopped}." in job.log(0)
    assert "Traceback" not in job.log()
    steps = job.steps()
    assert [step for step, *_ in steps] == [*range(STEPS + 1)]
    assert steps[stopped + 1 :] == after(stopped, job.local(1, step=stopped))
    recovery.record(record_property)


@pytest.mark.parametrize("job", [2], indirect=True)
def test_the_host_that_keeps_the_rendezvous_is_lost(job: Job, record_property: Record):
    """The others end and say so; the same command resumes with another MASTER_ADDR."""
    job.wait_for_step(INTERVAL + 1)
    recovery = job.recovery()
    job.vanish(0)
    job.wait_for_end(1, code=1)
    assert "launch/nodes.sh: the rendezvous at 10.77.3.1:29400 does not answer" in job.log(1)
    assert "with another MASTER_ADDR" in job.log(1)
    assert "Traceback" not in job.log(1)
    job.keeper = 1
    job.start(1)
    job.wait_for_end(1, code=0)
    assert job.resumed(1) == INTERVAL
    assert after(INTERVAL, job.steps()) == after(INTERVAL, job.local(1, step=INTERVAL))
    recovery.record(record_property)
