"""Two hosts on one machine: network namespaces, joined by a cable, that run launch/nodes.sh."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hosts import missing
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
