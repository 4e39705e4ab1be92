"""TensorBoard, Weights & Biases (offline) and MLflow themselves: one run, whatever jobs write it.

What they wrote is read back with their own readers.
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.data import Data
from megatron_moe.config.load import dump
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.run import Log, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.errors import ConfigError
from megatron_moe.rules import installed
from megatron_moe.rules.installed import require_packages
from megatron_moe.train import sinks
from megatron_moe.train.metrics import MetricsWriter
from megatron_moe.train.sinks import open_sinks

wandb_only = pytest.mark.skipif(not installed.find_spec("wandb"), reason="wandb is not installed")
mlflow_only = pytest.mark.skipif(
    not installed.find_spec("mlflow"), reason="mlflow-skinny is not installed"
)


def config(folder: Path, **log: Any) -> RunConfig:
    return RunConfig(
        run=Run(dir=folder),
        source=Source(path=folder),
        moe=Moe(num_moe_experts=2),
        data=Data(path=folder),
        train=Train(steps=9),
        log=Log(**{"tensorboard": False, **log}),
    )


def write(run: RunConfig, steps: range, *, resumed_step: int, scale: float = 1.0) -> list[str]:
    """Write these steps as one job does; return what it logged."""
    said: list[str] = []
    require_packages(run)
    with open_sinks(run, rank=0, say=said.append) as opened:
        writer = MetricsWriter(run.run.dir, opened, resumed_step=resumed_step)
        for step in steps:
            writer.write({"step": step, "loss/lm": scale * step, "router/entropy_by_layer": [1.0]})
        writer.close()
    return said


def test_other_ranks_open_nothing(tmp_path: Path):
    with open_sinks(config(tmp_path, tensorboard=True), rank=1, say=print) as opened:
        assert opened == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == package else True)
    log = {"tensorboard": {"tensorboard": True}, "wandb": {"wandb_project": "x"},
           "mlflow": {"mlflow_experiment": "x"}}[package]  # fmt: skip
    with pytest.raises(ConfigError, match=f"requires the package {package}, which is not") as error:
        require_packages(config(tmp_path, **log))
    way_out = {
        "tensorboard": "pip install tensorboard, or log.tensorboard=false",
        "wandb": "pip install 'megatron-moe[wandb]', or log.wandb_project=null",
        "mlflow": "pip install 'megatron-moe[mlflow]', or log.mlflow_experiment=null",
    }
    assert str(error.value).splitlines()[1] == "  " + way_out[package]  # fmt: skip


def test_a_copied_run_gets_an_id_of_its_own_and_a_moved_one_keeps_it(tmp_path: Path):
    """Jobs of a copy used to write into the original's run at the service."""
    said: list[str] = []
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.yaml").write_text(dump(config(first)))
    original = sinks.wandb_id(first, said.append)
    assert sinks.wandb_id(first, said.append) == original
    linked = tmp_path / "linked"
    linked.symlink_to(first)
    assert sinks.wandb_id(linked, said.append) == original
    assert said == []

    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    own = sinks.wandb_id(copy, said.append)
    assert own != original
    assert said == [
        f"{copy} is a copy of {first}: it becomes another run than {original} (wandb_id)"
    ]
    assert sinks.wandb_id(copy, said.append) == own
    assert sinks.wandb_id(first, said.append) == original

    moved = Path(shutil.move(first, tmp_path / "moved"))
    assert sinks.wandb_id(moved, said.append) == original
    assert len(said) == 1


# ---- TensorBoard ---------------------------------------------------------------------------------


def events(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["loss/lm"], "and no lists"
    pairs = [(event.step, event.value) for event in reader.Scalars("loss/lm")]
    assert len(pairs) == len(dict(pairs)), "each step once"
    return dict(pairs)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_the_last_values_of_steps_that_are_taken_again(tmp_path: Path):
    run = config(tmp_path, tensorboard=True)
    write(run, range(5), resumed_step=0)
    write(run, range(3, 7), resumed_step=2, scale=10.0)
    assert events(tmp_path) == {0: 0, 1: 1, 2: 2, 3: 30, 4: 40, 5: 50, 6: 60}


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_starts_anew_replaces_step_0_as_well(tmp_path: Path):
    run = config(tmp_path, tensorboard=True)
    write(run, range(1), resumed_step=0)
    write(run, range(2), resumed_step=0)
    assert events(tmp_path) == {0: 0, 1: 1}


@pytest.mark.filterwarnings("ignore")
def test_a_roll_back_within_a_job_reaches_tensorboard(tmp_path: Path):
    run = config(tmp_path, tensorboard=True)
    with open_sinks(run, rank=0, say=print) as opened:
        writer = MetricsWriter(tmp_path, opened, resumed_step=0)
        for scale in (1.0, 7.0):
            for step in (1, 2, 3) if scale == 1.0 else (2,):
                writer.write({"step": step, "loss/lm": scale * step})
            writer.roll_back(1)
        writer.close()
    assert events(tmp_path) == {1: 1.0}


# ---- Weights & Biases ----------------------------------------------------------------------------

JOB = """
import sys
from pathlib import Path
from megatron_moe.config.run import RunConfig
from megatron_moe.rules.installed import require_packages
from megatron_moe.train.sinks import open_sinks
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
require_packages(config)
with open_sinks(config, rank=0, say=print) as (sink,):
    for step in map(int, sys.argv[2:]):
        sink.write({"loss/lm": float(step)}, step)
"""


def job(folder: Path, first: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Write two steps as a job of its own would; no credentials of this machine are visible."""
    file = folder / "config.json"
    file.write_text(config(folder, wandb_project="test").model_dump_json())
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    hidden = {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    return subprocess.run(
        [sys.executable, "-c", JOB, str(file), str(first), str(first + 1)],
        env={**kept, **hidden, **environment}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def history(file: Path) -> dict[int, float]:
    """Return the loss of each step in a .wandb file: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, partial = file.read_bytes(), 7, b""
    losses = {}
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # the rest of a block is empty
            position += 2**15 - position % 2**15
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind, position = data[position + 6], position + 7
        partial += data[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(partial)
            partial = b""
            values = {".".join(item.nested_key) or item.key: item.value_json
                      for item in record.history.item}  # fmt: skip
            if "loss/lm" in values:
                losses[record.history.step.num] = float(values["loss/lm"])
    return losses


@wandb_only
def test_jobs_that_resume_a_run_write_to_one_wandb_run_offline(tmp_path: Path):
    for first in (1, 3):
        done = job(tmp_path, first, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    identity = (tmp_path / "wandb_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert [history(file) for file in files] == [{1: 1.0, 2: 2.0}, {3: 3.0, 4: 4.0}]


@wandb_only
def test_a_run_without_credentials_of_wandb_is_refused_before_it_starts(tmp_path: Path):
    refused = job(tmp_path, 1)
    assert refused.returncode == 1
    assert (
        "log.wandb_project (test) requires credentials of Weights & Biases, and wandb finds none"
        in refused.stderr
    )
    assert not (tmp_path / "wandb").exists()


@pytest.mark.slow  # wandb tries for 20 seconds
@wandb_only
def test_a_wandb_server_that_cannot_be_reached_is_refused_in_words(tmp_path: Path):
    """The key has the form of a real one; the server is a port of this machine that is closed."""
    refused = job(
        tmp_path, 1, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="3",
    )  # fmt: skip
    assert refused.returncode == 1
    assert "ConfigError: log.wandb_project (test): Weights & Biases cannot start" in refused.stderr


# ---- MLflow --------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return MLflow's client of a folder, which needs no server and no database."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    uri = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def mlflow_runs(store: Any) -> list[Any]:
    return store.search_runs([store.get_experiment_by_name("moe").experiment_id])


def test_jobs_that_resume_a_run_write_to_one_mlflow_run(tmp_path: Path, store: Any):
    run = config(tmp_path / "run", mlflow_experiment="moe")
    run.run.dir.mkdir()
    assert write(run, range(1, 4), resumed_step=0) == []
    assert write(run, range(3, 6), resumed_step=2, scale=10.0) == []
    (only,) = mlflow_runs(store)
    assert only.info.run_name == "run"
    assert only.info.status == "FINISHED"
    assert only.data.params["train.steps"] == "9"
    assert set(only.data.metrics) == {"loss/lm"}, "and no lists"
    values = store.get_metric_history(only.info.run_id, "loss/lm")
    in_order = {v.step: v.value for v in sorted(values, key=lambda value: value.timestamp)}
    assert in_order == {1: 1, 2: 2, 3: 30, 4: 40, 5: 50}


def test_a_job_that_fails_is_failed_at_mlflow_and_a_later_one_is_not(tmp_path: Path, store: Any):
    run = config(tmp_path, mlflow_experiment="moe")
    with pytest.raises(ZeroDivisionError), open_sinks(run, rank=0, say=print):
        _ = 1 / 0
    assert [r.info.status for r in mlflow_runs(store)] == ["FAILED"]
    with open_sinks(run, rank=0, say=print):
        assert [r.info.status for r in mlflow_runs(store)] == ["RUNNING"]
    assert [r.info.status for r in mlflow_runs(store)] == ["FINISHED"]


def test_numbers_and_names_that_mlflow_would_refuse_are_written(tmp_path: Path, store: Any):
    run = config(tmp_path, mlflow_experiment="moe")
    with open_sinks(run, rank=0, say=print) as (sink,):
        sink.write({"loss/validation/wiki(en)": float("nan"), "skipped": 1}, 3)
    (only,) = mlflow_runs(store)
    assert set(only.data.metrics) == {"loss/validation/wiki_en_", "skipped"}


def test_a_store_that_fails_later_does_not_end_training(tmp_path: Path, store: Any):
    run = config(tmp_path, mlflow_experiment="moe")
    said: list[str] = []
    with open_sinks(run, rank=0, say=said.append) as (sink,):
        (only,) = mlflow_runs(store)
        store.delete_run(only.info.run_id)  # MLflow refuses to write to a deleted run
        for step in (1, 2):
            sink.write({"loss/lm": 1.0}, step)
    assert said[0].startswith("MLflow took no metrics of a step (")
    assert said[0].endswith("Training is not affected.")
    assert said[1] == "MLflow lacks 2 steps of this job; metrics.jsonl has them"


def test_a_slow_server_neither_delays_steps_nor_fills_memory(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sinks, "MLFLOW_PENDING", 2)
    monkeypatch.setattr(sinks, "MLFLOW_CLOSE_SECONDS", 0.2)
    run = config(tmp_path, mlflow_experiment="moe")
    answer, said = threading.Event(), list[str]()
    with open_sinks(run, rank=0, say=said.append) as (sink,):
        monkeypatch.setattr(sink, "_client", _Waiting(answer))
        for step in range(1, 9):
            sink.write({"loss/lm": 1.0}, step)
    answer.set()
    assert said[0].startswith("MLflow took no metrics of a step (the server is too slow)")
    assert said[1].startswith("MLflow lacks ")


class _Waiting:
    """A client whose requests take until the event is set."""

    def __init__(self, answer: threading.Event) -> None:
        self._answer = answer

    def log_batch(self, *_: Any, **__: Any) -> None:
        self._answer.wait(60)


def test_a_run_that_was_deleted_at_mlflow_is_refused_on_resume(tmp_path: Path, store: Any):
    run = config(tmp_path, mlflow_experiment="moe")
    write(run, range(1, 2), resumed_step=0)
    (tmp_path / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    with pytest.raises(ConfigError, match=r"log.mlflow_experiment \(moe\): MLflow at .* cannot"):
        write(run, range(2, 3), resumed_step=1)


@mlflow_only
@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///no/such/folder/x.db", "x://y"])
def test_an_address_without_a_server_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"log.mlflow_experiment \(moe\): MLflow at") as error:
        write(config(tmp_path, mlflow_experiment="moe"), range(1, 2), resumed_step=0)
    assert "log.mlflow_experiment=null" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@mlflow_only
def test_mlflow_without_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="requires the environment variable MLFLOW_TRACKING_URI"):
        require_packages(config(tmp_path, mlflow_experiment="moe"))
