"""Tests of joining a job: rank positions, devices, and local ranks that fail."""

import gc
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import disks
import pytest
import torch
import torch.distributed as dist

from megatron_moe.errors import ConfigError, JobError, UserError
from megatron_moe.runtime import world as world_module
from megatron_moe.runtime.launchers import (
    RankPosition,
    position_from_environment,
    wait_until_resolved,
)
from megatron_moe.runtime.world import (
    World,
    joined,
    resolve_device,
    run_local_ranks,
)

TORCHRUN = {
    "MASTER_ADDR": "node0", "MASTER_PORT": "29400", "RANK": "5", "WORLD_SIZE": "16",
    "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "8",
    "MASTER_ADDR": "node0", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Set the given launcher variables and unset all others."""
    for name in [*TORCHRUN, *SLURM, "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)

    def put(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "position"),
    [
        pytest.param({}, None, id="by-hand"),
        pytest.param(TORCHRUN, RankPosition(5, 16, 1, 4, "env://"), id="torchrun"),
        pytest.param(
            {"RANK": "0", "WORLD_SIZE": "1"},
            None,
            id="rank-and-size-only",
        ),
        pytest.param(SLURM, RankPosition(9, 16, 1, 8, "tcp://node0:29500"), id="slurm"),
        pytest.param(
            SLURM | {"MASTER_PORT": "1234"},
            RankPosition(9, 16, 1, 8, "tcp://node0:1234"),
            id="slurm-port",
        ),
        pytest.param(
            SLURM | TORCHRUN, RankPosition(5, 16, 1, 4, "env://"), id="torchrun-inside-slurm"
        ),
        pytest.param(SLURM | {"SLURM_NTASKS": "1"}, None, id="slurm-one-task"),
        pytest.param({"RANK": "0"}, None, id="half-of-torchrun"),
    ],
)
def test_the_environment_says_where_a_process_stands(environment, variables, position):
    environment(variables)
    assert position_from_environment() == position


def test_a_name_that_nobody_knows_is_refused():
    position = RankPosition(0, 2, 0, 1, "tcp://no-such-host.invalid:29500")
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR \(no-such-host.invalid\) cannot be res"):
        wait_until_resolved(position, seconds=0.1)


def test_a_name_may_be_published_late(monkeypatch: pytest.MonkeyPatch):
    answers = iter([socket.gaierror(socket.EAI_NONAME, "unknown"), []])

    def lookup(*_: object):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    wait_until_resolved(RankPosition(0, 2, 0, 1, "tcp://late:29500"), seconds=30)
    assert next(answers, None) is None


def test_the_cpu_hides_gpus_from_this_process_and_its_children():
    """The tests, the demo and device=cpu behave the same with and without GPUs."""
    asked = "import torch; print(torch.cuda.device_count())"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert subprocess.check_output([sys.executable, "-c", asked], text=True).strip() == "0"


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match=r"run\.device \(cuda\) needs a CUDA device") as caught:
        resolve_device("cuda")
    assert "\n  set run.device=cpu" in str(caught.value)


def test_cuda_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [resolve_device(wanted) for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_ranks_do_not_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", ranks=2) == "cuda"
    assert capsys.readouterr().out == ""
    assert resolve_device("auto", ranks=4) == "cpu"
    message = "Using the CPU (run.device=auto): 4 ranks need more than 2 GPU(s)\n"
    assert capsys.readouterr().out == message
    with pytest.raises(ConfigError) as caught:
        resolve_device("cuda", ranks=4)
    assert str(caught.value) == (
        "run.device (cuda) needs a GPU for every rank, but torch finds 2 for --ranks 4.\n"
        "  set --ranks 2, or run.device=cpu to train on CPU with gloo"
    )
    assert resolve_device("cpu", ranks=4) == "cpu"


@pytest.mark.distributed
def test_ranks_join_one_world(tmp_path: Path):
    def run(world: World) -> None:
        total = torch.tensor([10.0**world.rank])
        dist.all_reduce(total)
        assert (world.rank, world.size) == (dist.get_rank(), dist.get_world_size())
        (tmp_path / str(world.rank)).write_text(f"{total.item():.0f} {world.local_rank}")

    run_local_ranks(run, ranks=3, device="cpu")
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == ["111 0", "111 1", "111 2"]


@pytest.mark.distributed
def test_ranks_do_not_search_the_imports_for_garbage():
    """They would copy the memory that they share, to write to each object's header."""

    def frozen(world: World) -> None:
        assert gc.get_freeze_count() > 100_000

    run_local_ranks(frozen, ranks=2, device="cpu")
    assert gc.get_freeze_count() == 0, "this process still collects its garbage"


@pytest.mark.distributed
def test_megatron_warns_on_one_rank_alone(capfd: pytest.CaptureFixture[str]):
    def run(world: World) -> None:  # print warnings that pytest would capture
        warnings.showwarning = lambda message, *_: os.write(2, f"{message}\n".encode())
        logging.getLogger("megatron.core").addHandler(logging.StreamHandler(sys.__stderr__))
        for module in ("megatron.core.transformer.transformer_config", "ours"):
            warnings.warn_explicit(f"{module} warns", UserWarning, "file.py", 1, module=module)
        logging.getLogger("megatron.core.models").warning("megatron logs")
        dist.barrier()  # a rank that ends while another still connects to it fails the other

    run_local_ranks(run, ranks=3, device="cpu")
    output = capfd.readouterr().err
    assert output.count("megatron.core.transformer.transformer_config warns") == 1
    assert output.count("ours warns") == 3
    assert output.count("megatron logs") == 1


@pytest.mark.distributed
def test_what_all_ranks_refuse_is_reported_once():
    def run(world: World) -> None:
        dist.barrier()
        raise ConfigError("moe.x (3) is odd.\n  set moe.x=4")

    with pytest.raises(UserError) as caught:
        run_local_ranks(run, ranks=3, device="cpu")
    assert str(caught.value) == "moe.x (3) is odd.\n  set moe.x=4"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["user-error", "bug", "killed"])
def test_a_rank_that_fails_ends_the_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(world_module, "NOTICE_SECONDS", 1.0)

    def run(world: World) -> None:
        (tmp_path / str(world.rank)).write_text(str(os.getpid()))
        if world.rank != 1:
            time.sleep(1200)
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        if kind == "user-error":
            raise ConfigError("only rank 1 saw it")
        if kind == "bug":
            raise ZeroDivisionError("a bug of rank 1")
        os._exit(3)

    expected = {
        "user-error": (UserError, "^only rank 1 saw it$"),
        "bug": (RuntimeError, "(?s)rank 1 failed:.*Traceback.*a bug of rank 1"),
        "killed": (JobError, "rank 1 exited with code 3"),
    }
    start = time.monotonic()
    with pytest.raises(expected[kind][0], match=expected[kind][1]) as caught:
        run_local_ranks(run, ranks=2, device="cpu")
    assert isinstance(caught.value, UserError) == (kind != "bug")
    assert time.monotonic() - start < 300
    sleeper = int((tmp_path / "0").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper, 0)


@pytest.mark.distributed
@pytest.mark.skipif(disks.missing() is not None, reason=str(disks.missing()))
@pytest.mark.parametrize("error", [ConfigError("moe.x is odd"), ZeroDivisionError("a bug")])
def test_an_error_is_not_lost_with_its_disk(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """Local ranks leave errors in a temporary folder; an empty file there is no message."""

    def run(world: World) -> None:
        dist.barrier()
        if world.rank == 1:
            disk.fill()
            raise error
        time.sleep(1200)

    monkeypatch.setattr(world_module, "NOTICE_SECONDS", 1.0)
    with disks.Disk(tmp_path / "disk", 2**16) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
        with pytest.raises(JobError, match=r"rank 1 failed and left no report: .* may be full"):
            run_local_ranks(run, ranks=2, device="cpu")
    assert str(error) in capfd.readouterr().err


class Joining:
    """Replace CUDA and torch.distributed while `joined` runs, and record its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object]] = []
        monkeypatch.setattr(
            torch.cuda, "set_device", lambda index: self.calls.append(("set_device", index))
        )
        monkeypatch.setattr(
            dist, "init_process_group", lambda *args, **kwargs: self.calls.append(("init", kwargs))
        )
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(world_module, "meet", lambda position: None)
        store = dist.HashStore()
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device)
        )


def test_a_gpu_is_current_before_the_job_is_joined_and_not_bound_to_it(
    monkeypatch: pytest.MonkeyPatch,
):
    """A device_id would create communicators eagerly and serialize unbatched transfers."""
    joining = Joining(monkeypatch)
    with world_module.joined(RankPosition(5, 16, 1, 4, "tcp://127.0.0.1:1"), "cuda") as world:
        assert world.device == torch.device("cuda", 1)
    (first, index), (second, kwargs) = joining.calls
    assert (first, index, second) == ("set_device", 1, "init")
    assert isinstance(kwargs, dict)
    assert kwargs.get("device_id") is None


def test_a_launched_rank_reports_with_the_way_out(capfd: pytest.CaptureFixture[str]):
    world = World(3, 4, 1, torch.device("cpu"), "127.0.0.1")
    world.report_error(JobError("rank 1 on node1 died"))
    assert capfd.readouterr().err == (
        "rank 3: JobError: rank 1 on node1 died\n"
        "  run the same command to resume, unless the launcher restarts the job\n"
    )


def test_groups_of_a_lost_rank_are_not_destroyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That can wait for the lost rank or crash, before the operator has seen the error."""
    destroyed: list[str] = []
    monkeypatch.setattr(world_module.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(world_module.dist, "destroy_process_group", lambda: destroyed.append("x"))
    monkeypatch.setattr(world_module, "threads_per_rank", lambda _: None)  # this process forks
    position = RankPosition(0, 1, 0, 1, f"file:{tmp_path / 'rendezvous'}")
    with pytest.raises(JobError), joined(position, "cpu"):
        raise JobError("rank 1 died")
    assert not destroyed
    with pytest.raises(ConfigError), joined(position, "cpu"):
        raise ConfigError("another kind of error")
    assert destroyed
