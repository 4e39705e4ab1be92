"""Two hosts on one machine: network namespaces, joined by a cable, that run launch/nodes.sh."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hosts import Hosts, missing
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.3.1", "10.77.3.2")
EXACT = ("step", "loss/lm", "grad_norm")


def ip(*words: str) -> bool:
    done = subprocess.run(["ip", *words], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Return the names of two namespaces that reach each other and nothing else."""
    names = [f"mm{os.getpid()}{end}" for end in "ab"]
    if shutil.which("ip") is None or os.geteuid() != 0 or not ip("netns", "add", names[0]):
        pytest.skip("needs root and network namespaces")
    assert ip("netns", "add", names[1])
    cable = f"{names[0]} type veth peer name eth0 netns {names[1]}".split()
    assert ip("link", "add", "eth0", "netns", *cable)
    for name, address in zip(names, ADDRESSES, strict=True):
        assert ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        assert ip("-n", name, "link", "set", "eth0", "up")
        assert ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        ip("netns", "del", name)


def launch(hosts: list[str], config: Path) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, ROOT / "launch" / "nodes.sh", config],
            env={
                **os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NNODES": "2",
                "MASTER_ADDR": ADDRESSES[0], "NODE_ADDR": address, "RANKS": "1", "RESTARTS": "0",
                "GLOO_SOCKET_IFNAME": "eth0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host, address in zip(hosts, ADDRESSES, strict=True)
    ]  # fmt: skip


@pytest.mark.distributed
def test_two_hosts_train_as_one(hosts: list[str], tmp_path: Path):
    """Their losses equal those of two ranks of one machine."""
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    settings = tree(
        tmp_path / "run", dense, tokens, train={"steps": 3}, parallel={"expert_parallel_size": 2}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    started = launch(hosts, tmp_path / "run.yaml")
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "2 ranks on cpu" in "".join(outputs)
    alone = run_training(
        {**settings, "run": {"dir": str(tmp_path / "alone"), "device": "cpu"}}, world_size=2
    )
    two = read_metrics(tmp_path / "run")
    assert [[line.get(name) for name in EXACT] for line in two] == [
        [line.get(name) for name in EXACT] for line in alone
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_two_of_three_hosts_resume(tmp_path: Path):
    """Torchrun restarts the ranks that are left, which take the nearest legal layout.

    Steps after the restart equal those of two local ranks that resume the same checkpoint.
    """
    settings = tree(
        tmp_path / "run", save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens"),
        train={"steps": STEPS, "global_batch_size": 6}, moe={"num_moe_experts": 6},
        parallel={"expert_parallel_size": 3, "adapt_to_ranks": True},
        checkpoint={"interval": 3, "keep": STEPS}, guard={"hang_seconds": 15},
    )  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    with Hosts(3) as hosts:
        started = [elastic(hosts, host, config, tmp_path / f"{host}.log") for host in range(3)]
        try:
            wait_for(lambda: len(read_metrics(tmp_path / "run")) > STEPS // 3, started)
            hosts.cut(2)
            for process in started[:2]:
                process.wait(timeout=500)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    log = (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert [process.returncode for process in started[:2]] == [0, 0], log
    assert "has been silent for 15 s" in log
    assert "Layout for 2 rank(s): parallel.expert_parallel_size=2" in log, log
    resumed = re.search(r"Resumed \S+ at step (\d+)", log)
    assert resumed is not None, log
    step = int(resumed[1])
    lines = read_metrics(tmp_path / "run")
    assert step >= 3
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))

    alone = tmp_path / "alone" / "checkpoints"
    kept = f"step_{step:08d}"
    shutil.copytree(tmp_path / "run" / "checkpoints" / kept, alone / kept)
    (alone / "latest").write_text(f"{kept}\n")
    train = [sys.executable, "-m", "megatron_moe", "train", config, f"run.dir={alone.parent}"]
    done = subprocess.run(
        [*map(str, train), "--ranks", "2"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [line for line in read_metrics(alone.parent) if line["step"] > step]
    assert [[line.get(name) for name in EXACT] for line in lines[step:]] == [
        [line.get(name) for name in EXACT] for line in expected
    ]


STEPS = 16


def elastic(hosts: Hosts, host: int, config: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start launch/nodes.sh on a host, for two or three of them."""
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", hosts.names[host], ROOT / "launch" / "nodes.sh", config],
            env={
                **os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NNODES": "2:3",
                "MASTER_ADDR": hosts.addresses[0], "NODE_ADDR": hosts.addresses[host],
                "RANKS": "1", "RESTARTS": "3", "GLOO_SOCKET_IFNAME": "eth0",
            },
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def wait_for(condition: Callable[[], bool], job: list[subprocess.Popen[bytes]]) -> None:
    while True:
        assert [process.poll() for process in job] == [None] * len(job), "a host has ended"
        try:
            if condition():
                return
        except (OSError, ValueError):  # no file yet, or half a line
            pass
        time.sleep(0.2)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_an_unknown_own_name_is_refused(tmp_path: Path):
    """Torchrun would end with a traceback."""
    (tmp_path / "run.yaml").touch()
    script = f"hostname no-such-name; exec {ROOT}/launch/nodes.sh {tmp_path}/run.yaml"
    done = subprocess.run(
        ["unshare", "--uts", "bash", "-c", script],
        env={**os.environ, "PYTHON": sys.executable, "NNODES": "2", "MASTER_ADDR": "127.0.0.1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no-such-name, the name of this machine, cannot be resolved" in done.stderr
