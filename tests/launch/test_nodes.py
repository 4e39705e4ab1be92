"""Two hosts on one machine: network namespaces, joined by a cable, that run launch/nodes.sh."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hosts import missing
from recovery import Record, told
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


def launch(
    hosts: list[str],
    config: Path,
    paths: tuple[str, str] = ("", ""),
    *,
    restarts: int = 0,
    changes: tuple[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Run launch/nodes.sh on both hosts, each with one more folder in PYTHONPATH.

    `changes` are settings, one on the command line of each host.
    """
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, ROOT / "launch" / "nodes.sh", config, *change],
            env={
                **os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{path}",
                "NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "NODE_ADDR": address, "RANKS": "1",
                "RESTARTS": str(restarts), "GLOO_SOCKET_IFNAME": "eth0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host, address, path, *change in zip(
            hosts, ADDRESSES, paths, *([changes] if changes else []), strict=True
        )
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


def refused_settings(root: Path) -> Path:
    """Return the file of a configuration that breaks a rule on two ranks."""
    settings = tree(
        root / "run", save_dense(root / "dense"), write_tokens(root / "tokens"),
        parallel={"tensor_parallel_size": 3},
    )  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root / "run.yaml"


def test_no_host_tries_a_refused_setting_again(hosts: list[str], tmp_path: Path):
    """Each reports its own reason, also one whose ranks are later than the rendezvous's keeper."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        "import os, time\nif 'RANK' in os.environ: time.sleep(3)"
    )
    started = launch(hosts, refused_settings(tmp_path), ("", str(late)), restarts=3)
    for process in started:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 1, output
        assert output.count("nearest legal layout of 2 ranks: ") == 1, output
        assert "launch/nodes.sh: ranks of this machine failed with exit status 2: " in output
        assert "Correct what they name, and run the same command on all machines." in output
        assert "Traceback" not in output, output


@pytest.mark.parametrize("refuses", [0, 1], ids=["keeper", "other"])
def test_a_host_ends_if_only_the_other_refuses_its_input(
    hosts: list[str], tmp_path: Path, refuses: int
):
    """Its ranks would wait ten minutes for those of the other; host 0 keeps the rendezvous."""
    settings = tree(
        tmp_path / "run", save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    first, second = (f"train.steps={-1 if host == refuses else 3}" for host in (0, 1))
    started = launch(hosts, tmp_path / "run.yaml", restarts=3, changes=(first, second))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    refusing, waiting = outputs[refuses], outputs[1 - refuses]
    assert [process.returncode for process in started] == [1, 1]
    assert "train.steps is -1" in refusing
    assert "another machine of the job, have refused a setting or a file" in waiting
    assert "Correct what it names, and run the same command on all machines." in waiting
    assert "Traceback" not in waiting + refusing, waiting + refusing


def test_a_local_job_ends_with_its_own_message_alone(tmp_path: Path):
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", refused_settings(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RANKS": "2"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    kinds = ("launch/local.sh: ", "ConfigError: ", "  ")
    foreign = [line for line in done.stderr.splitlines() if not line.startswith(kinds)]
    assert foreign == []
    end = "their errors are above.\n  Correct what they name, and run the same command.\n"
    assert done.stderr.endswith(end), done.stderr


def test_another_program_uses_the_port_of_the_rendezvous():
    """It takes the connection and never answers; torch would wait for it without an end."""
    agent = "import keeper; keeper.CONNECT_SECONDS = 1; import agent; agent.main()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [
                sys.executable, "-c", agent, "--nnodes", "2", "--rdzv-backend", "c10d_limited",
                "--rdzv-endpoint", endpoint, "--rdzv-id", "job", "-m", "megatron_moe",
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT / "launch")},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"the rendezvous at {endpoint} does not answer: " in done.stderr
    assert "if the port is taken, with another MASTER_PORT.\n" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_may_be_an_hour_apart(hosts: list[str], tmp_path: Path, hours: int):
    """Python's clock is wrong on the second host; torchrun drops heartbeats older than 15 s."""
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    settings = tree(
        tmp_path / "run", dense, tokens, train={"steps": 3}, parallel={"expert_parallel_size": 2}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "sitecustomize.py").write_text(
        f"import time\nright = time.time\ntime.time = lambda: right() + {3600 * hours}\n"
    )
    started = launch(hosts, tmp_path / "run.yaml", ("", str(tmp_path / "wrong")))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_an_unknown_own_name_is_refused(tmp_path: Path, record_property: Record):
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
    record_property("saw", told(done.stderr))
