"""Rows 13, 14, 16 to 21, 24, 39: machines, launchers and signals as people have them.

Whole commands run in processes of their own, most of them forks of this one.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from commands import Command, read, run_command, start_command
from tiny import save_dense
from training_runs import tree, write_tokens

from megatron_moe.errors import ConfigError, DataError
from megatron_moe.hf.disk import make_folder
from megatron_moe.runtime.cores import available_cores, threads_per_rank
from megatron_moe.runtime.launchers import RankPosition, position_from_environment
from megatron_moe.runtime.world import World, run_local_ranks

ROOT = Path(__file__).parents[2]
LAUNCHER_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MPI_")


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a configuration whose model and tokens every user may read."""
    root = tmp_path_factory.mktemp("machines")
    settings = tree(
        root / "run", save_dense(root / "dense"), write_tokens(root / "tokens"),
        train={"steps": 2, "global_batch_size": 4, "precision": "fp32"},
    )  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root / "run.yaml"


def command(run_yaml: Path, *overrides: object) -> list[str]:
    words = [sys.executable, "-m", "megatron_moe", "train", run_yaml, *overrides]
    return [str(word) for word in words]


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def finished(run_dir: Path) -> bool:
    latest = run_dir / "checkpoints" / "latest"
    return latest.exists() and latest.read_text().strip() == "step_00000002"


# ---- users and temporary folders -----------------------------------------------------------------


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("uid", [54321, 2**31 - 10])
def test_a_user_without_a_passwd_entry_can_lock_a_run(tmp_path: Path, uid: int):
    """Python's own ``getpass.getuser`` raises KeyError for such a user."""
    from megatron_moe.runtime.environment import has_home, user_name
    from megatron_moe.train.lock import _identity

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.write(writing, json.dumps([_identity(), user_name(), has_home()]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        identity, name, home = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert identity["user"] == name == f"uid {uid}"
    assert not home


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["a@b", "with space", "100%25", "\u00fcml\u00e4ut", "long" * 40, "#?;"]
)
def test_any_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def meet_there(_: World) -> None:
        assert list(folder.glob("megatron-moe-*")), "ranks meet in it"
        dist.barrier()

    run_local_ranks(meet_there, ranks=2, device="cpu")


def test_no_folder_for_temporary_files_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(ConfigError, match=r"(?s)temporary files.*set TMPDIR"):
        run_local_ranks(lambda _: None, ranks=1, device="cpu")


# ---- launchers -----------------------------------------------------------------------------------

KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
        "SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "node0"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
         "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}  # fmt: skip

POSITIONS: dict[str, tuple[dict[str, str], RankPosition | None]] = {
    "kubeflow": (KUBEFLOW, RankPosition(1, 2, 0, 1, "env://")),
    "srun": (SRUN, RankPosition(1, 4, 1, 2, "tcp://node0:29500")),
    "sbatch-without-srun": ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, None),
    "salloc": ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),
    "open-mpi-one-node": (OPEN_MPI, RankPosition(2, 4, 2, 4, "tcp://127.0.0.1:29500")),
    "open-mpi-two-nodes": (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "n0",
                                       "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
                           RankPosition(2, 4, 0, 2, "tcp://n0:29500")),
    "open-mpi-one-rank": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
    "mpich": (MPICH, RankPosition(3, 8, 1, 2, "tcp://node0:1234")),
    "srun-with-pmi": (SRUN | MPICH | {"MASTER_PORT": "29500"},
                      RankPosition(1, 4, 1, 2, "tcp://node0:29500")),
    "stray-rank": ({"RANK": "3"}, None),
    "stray-size": ({"WORLD_SIZE": "8"}, None),
    "one-rank-of-nobody": ({"RANK": "0", "WORLD_SIZE": "1"}, None),
}  # fmt: skip
CONTRADICTIONS = {
    "not-a-number": ({"RANK": "x", "WORLD_SIZE": "2"}, r"RANK \('x'\) must be an integer"),
    "empty": ({"RANK": "", "WORLD_SIZE": "2"}, r"RANK \(''\) must be an integer"),
    "no-ranks": ({"RANK": "0", "WORLD_SIZE": "0"}, r"RANK \(0\) must be from 0 to WORLD_SIZE"),
    "beyond": ({"RANK": "3", "WORLD_SIZE": "2"}, r"RANK \(3\) must be from 0 to WORLD_SIZE \(2\)"),
    "negative": ({"RANK": "-1", "WORLD_SIZE": "2"}, r"RANK \(-1\) must be from 0"),
    "no-address": ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    "mpi-beyond": (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "9"}, r"OMPI_COMM_WORLD_RANK \(9\)"),
    "mpi-no-address": (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR is not set"),
    "local": (KUBEFLOW | {"LOCAL_RANK": "a"}, r"LOCAL_RANK \('a'\) must be an integer"),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES)]:
        monkeypatch.delenv(name)

    def launch(variables: dict[str, str]) -> RankPosition | None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return position_from_environment()

    return launch


@pytest.mark.parametrize("case", POSITIONS)
def test_a_process_takes_its_position_from_its_launcher(launched: Any, case: str):
    variables, position = POSITIONS[case]
    assert launched(variables) == position


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_launchers_that_contradict_themselves(launched: Any, case: str):
    variables, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=message):
        launched(variables)


def test_a_batch_script_gets_a_hint_at_srun(launched: Any, capsys: pytest.CaptureFixture[str]):
    assert launched(POSITIONS["sbatch-without-srun"][0]) is None
    assert "Use srun to run on all tasks" in capsys.readouterr().err


# ---- cores ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_core(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_affinity_is_honored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with only_core(min(os.sched_getaffinity(0))):
        assert available_cores(tmp_path) == 1
        assert threads_per_rank(1) == 1


QUOTAS = {
    "v2": ({"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v2-half": ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "v2-none": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "v2-above": ({"sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
                  "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
                  "proc/self/cgroup": "0::/pod/box\n"}, 3),
    "v1": ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
    "v1-none": ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                 "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 64),
    "broken": ({"sys/fs/cgroup/cpu.max": "many\n"}, 64),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas_are_honored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    files, cores = QUOTAS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert available_cores(tmp_path) == cores


def test_the_users_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank(1) is None


# ---- signals and pipes ---------------------------------------------------------------------------

LONG = ("train.steps=400", "optimizer.warmup_steps=1")


def start(run_yaml: Path, run_dir: Path, hangup: signal.Handlers = signal.SIG_DFL) -> Command:
    """Start a long run in a session of its own, and wait for its second step."""

    def prepare() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        signal.signal(signal.SIGHUP, hangup)

    job = start_command("train", run_yaml, f"run.dir={run_dir}", *LONG, prepare=prepare)
    wait_for_steps(job, 2)
    return job


def steps_of(job: Command) -> int:
    return read(job.out).count("\nstep ")


def wait_for_steps(job: Command, count: int) -> None:
    while steps_of(job) < count:
        assert job.process.is_alive(), job.wait()
        time.sleep(0.01)


def pid_of(job: Command) -> int:
    assert job.process.pid is not None
    return job.process.pid


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        pytest.param(number, group, marks=[] if quick else pytest.mark.slow,
                     id=f"{'terminal' if group else 'process'}-{int(number)}")
        for number, group, quick in (
            (signal.SIGINT, True, True), (signal.SIGINT, False, False),
            (signal.SIGHUP, True, True), (signal.SIGHUP, False, False),
            (signal.SIGTERM, True, False), (signal.SIGTERM, False, True),
        )
    ],
)  # fmt: skip
def test_a_signal_saves(run_yaml: Path, tmp_path: Path, number: int, whole_group: bool):
    job = start(run_yaml, tmp_path / "run")
    (os.killpg if whole_group else os.kill)(pid_of(job), number)
    done = job.wait()
    assert done.returncode == 0, done.stderr
    assert "Stopped by a signal after step" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.distributed
def test_a_second_interrupt_ends_at_once(run_yaml: Path, tmp_path: Path):
    job = start(run_yaml, tmp_path / "run")
    for _ in range(3):  # signals that arrive together are one
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid_of(job), signal.SIGINT)
        time.sleep(0.05)
    done = job.wait()
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_nohup_is_honored(run_yaml: Path, tmp_path: Path):
    """It starts a program with the signal ignored, which the program must leave so."""
    job = start(run_yaml, tmp_path / "run", hangup=signal.SIG_IGN)
    os.killpg(pid_of(job), signal.SIGHUP)
    wait_for_steps(job, steps_of(job) + 2)  # a signal that is heeded ends the run after a step
    os.killpg(pid_of(job), signal.SIGTERM)
    assert job.wait().returncode == 0


@pytest.mark.distributed
@pytest.mark.parametrize("errors_too", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_closed_output_does_not_end_the_run(run_yaml: Path, tmp_path: Path, errors_too: bool):
    words = " ".join(f"'{w}'" for w in command(run_yaml, f"run.dir={tmp_path / 'run'}"))
    pipe = f"set -o pipefail; {words} {'2>&1' if errors_too else ''} | head -2"
    result = subprocess.run(
        ["bash", "-c", pipe], env=environment(), capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert finished(tmp_path / "run")
    if not errors_too:
        assert "Standard output was closed" in result.stderr


# ---- folders, packages and workers ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a file", "below a file", "too long"])
def test_folders_that_cannot_be_made_are_refused(tmp_path: Path, run_yaml: Path, kind: str):
    (tmp_path / "file").write_text("")
    path = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run",
            "too long": tmp_path / ("x" * 300)}[kind]  # fmt: skip
    result = run_command("train", run_yaml, f"run.dir={path}")
    assert result.returncode == 2
    assert f"ConfigError: run.dir ({path}) must be a folder that can be created" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="this user may not write to it"):
        make_folder(tmp_path, "run.dir")


@pytest.mark.slow
def test_a_server_for_metrics_that_is_not_there_is_noticed_before_upcycling(
    run_yaml: Path, tmp_path: Path
):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    result = subprocess.run(
        command(run_yaml, f"run.dir={tmp_path / 'run'}", "log.mlflow_experiment=x", "--ranks", 2),
        env=environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9"), capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    assert "ConfigError: log.mlflow_experiment (x): MLflow at" in result.stderr
    assert "Traceback" not in result.stderr
    assert "plan" not in result.stdout  # nothing was upcycled


def test_one_wandb_run_for_all_jobs_of_a_run(tmp_path: Path):
    from megatron_moe.train.sinks import wandb_id

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again, other = (wandb_id(tmp_path / name, print) for name in ("a", "a", "b"))
    assert first == again != other


def test_a_killed_tokenizing_process_is_named(
    tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from megatron_moe.data import corpus
    from megatron_moe.data.tokenizer import load_tokenizer

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(corpus, "encode_block", die)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(DataError, match="a tokenizing process was killed"):
        corpus.tokenize_files(
            [tmp_path / "a.jsonl"], tmp_path / "out", load_tokenizer(bpe_folder), workers=2
        )


def test_an_empty_prompt_is_refused(run_yaml: Path):
    result = run_command("generate", run_yaml.parent, "")
    assert result.returncode == 2
    assert result.stderr.startswith("ConfigError: PROMPT must not be empty")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "odd",
    [{"attn_implementation": "flash_attention_2"}, {"return_dict": False},
     *(pytest.param(odd, marks=pytest.mark.slow) for odd in (
         {"_attn_implementation": "flex_attention"}, {"output_hidden_states": True},
         {"use_cache": False}))],
    ids=lambda odd: next(iter(odd)),
)  # fmt: skip
def test_program_settings_of_the_source_are_ignored(run_yaml: Path, tmp_path: Path, odd: Any):
    """Row 23: the comparison with the source loads it with transformers."""
    shutil.copytree(run_yaml.parent / "dense", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | odd))
    run_command(
        "train", run_yaml, f"run.dir={tmp_path / 'run'}", f"source.path={tmp_path / 'dense'}",
        "upcycle.verify=always", "train.steps=0", "optimizer.warmup_steps=0", check=True,
    )  # fmt: skip
