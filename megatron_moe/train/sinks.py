"""Send metrics to TensorBoard, Weights & Biases and MLflow.

Each sink is opened before anything is computed, so that a server that refuses a run costs no work.
All jobs of a run write to one run of the service, whose id is kept in a file of ``run.dir``. Later
failures of a service never end training: `metrics.jsonl` holds the same numbers.
"""

from __future__ import annotations

import importlib
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

from megatron_moe.config.load import leaves, load
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError, UserError
from megatron_moe.hf.disk import write_text

Say = Callable[[str], None]

MLFLOW_PENDING = 1000
"""Number of steps that wait for a slow MLflow server, before further ones are dropped."""
MLFLOW_CLOSE_SECONDS = 60.0
"""Upper bound for the wait for MLflow at the end of a job."""


class Sink(Protocol):
    """Destination of the scalar metrics of each step."""

    def restart_after(self, step: int) -> None:
        """Expect the steps after ``step`` next, some of which may have been written before."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""

    def close(self, *, failed: bool) -> None:
        """Write what is pending, and mark the run as finished or failed."""


@contextmanager
def open_sinks(config: RunConfig, *, rank: int, say: Say) -> Iterator[list[Sink]]:
    """Open the sinks of ``config.log`` on rank 0, and close them at the end of the ``with`` block.

    Raises:
        ConfigError: A service cannot be reached or refuses the run.
    """
    wanted = [open_ for is_wanted, open_ in SINKS if is_wanted(config)] if rank == 0 else []
    sinks: list[Sink] = []
    try:
        sinks.extend(open_(config, say) for open_ in wanted)
        yield sinks
    except BaseException:
        for sink in sinks:
            sink.close(failed=True)
        raise
    for sink in sinks:
        sink.close(failed=False)


class TensorBoard:
    """Event files in ``run.dir/tensorboard``; readers drop steps that are written again."""

    def __init__(self, config: RunConfig, say: Say) -> None:
        self._folder = str(config.run.dir / "tensorboard")
        self._writer: Any = None

    def restart_after(self, step: int) -> None:
        """Begin a file that replaces the steps after ``step`` of earlier files."""
        from torch.utils.tensorboard import SummaryWriter

        self.close(failed=False)
        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        """Flush and close the current file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases. wandb sends in its own process, and ignores repeated steps."""

    def __init__(self, config: RunConfig, say: Say) -> None:
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                id=wandb_id(config.run.dir, say),
                name=config.run.dir.name,
                dir=str(config.run.dir),
                config=config.model_dump(mode="json"),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"log.wandb_project ({config.log.wandb_project}): Weights & Biases cannot start "
                f"the run: {error}\n"
                "  set WANDB_MODE=offline to write files for wandb sync, or log.wandb_project=null"
            ) from error

    def restart_after(self, step: int) -> None:
        """Do nothing: a run at Weights & Biases cannot take back its steps."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""
        self._run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until wandb has sent or written everything."""
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run at the MLflow server or in the folder that MLFLOW_TRACKING_URI names.

    A thread sends the numbers, because one request may take minutes if the server is down.
    """

    def __init__(self, config: RunConfig, say: Say) -> None:
        self._client: Any = None
        self._say, self._lost = say, 0
        self._pending: queue.Queue[tuple[Mapping[str, float], int, int] | None]
        self._pending = queue.Queue(MLFLOW_PENDING)
        name, uri = config.log.mlflow_experiment, os.environ["MLFLOW_TRACKING_URI"]
        mlflow: Any = importlib.import_module("mlflow")
        try:
            with _few_retries():
                self._client = mlflow.MlflowClient(tracking_uri=uri)
                self._run_id = _mlflow_run(self._client, config, say)
        except mlflow.MlflowException as error:
            raise ConfigError(
                f"log.mlflow_experiment ({name}): MLflow at MLFLOW_TRACKING_URI ({uri}) cannot "
                f"start the run: {error}\n"
                "  start the server or correct MLFLOW_TRACKING_URI, or log.mlflow_experiment=null"
            ) from error
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def restart_after(self, step: int) -> None:
        """Do nothing: MLflow keeps all values of a step, of which the newest is the valid one."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Queue the numbers of a step, unless too many are waiting."""
        try:
            self._pending.put_nowait((scalars, step, time.time_ns() // 1_000_000))
        except queue.Full:
            self._lose("the server is too slow")

    def close(self, *, failed: bool) -> None:
        """Wait a minute at most for the queue, and set the status of the run."""
        deadline = time.monotonic() + MLFLOW_CLOSE_SECONDS
        with suppress(queue.Full):
            self._pending.put(None, timeout=MLFLOW_CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        waiting = self._pending.qsize() if self._thread.is_alive() else 0
        if self._lost or waiting:
            self._say(
                f"MLflow lacks {self._lost + waiting} steps of this job; metrics.jsonl has them"
            )
        if waiting:
            return
        try:
            with _few_retries():
                self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")
        except Exception as error:
            self._say(f"MLflow did not take the end of the run: {error}")

    def _send_all(self) -> None:
        from mlflow.entities import Metric

        while (entry := self._pending.get()) is not None:
            scalars, step, milliseconds = entry
            metrics = [
                Metric(_mlflow_name(name), float(value), milliseconds, step)
                for name, value in scalars.items()
            ]
            try:
                self._client.log_batch(self._run_id, metrics=metrics)
            except Exception as error:  # whatever it is, training continues
                self._lose(str(error))

    def _lose(self, reason: str) -> None:
        """Count a step that MLflow did not take; log the first one."""
        self._lost += 1
        if self._lost == 1:
            self._say(f"MLflow took no metrics of a step ({reason}). Training is not affected.")


SINKS: tuple[tuple[Callable[[RunConfig], bool], Callable[[RunConfig, Say], Sink]], ...] = (
    (lambda config: config.log.tensorboard, TensorBoard),
    (lambda config: config.log.wandb_project is not None, WeightsAndBiases),
    (lambda config: config.log.mlflow_experiment is not None, Mlflow),
)
"""Whether a run has the sink, and how it is opened."""


def wandb_id(run_dir: Path, say: Say) -> str:
    """Return the id of the run at Weights & Biases, the same for every job that resumes it."""
    path = run_dir / "wandb_id"
    if (kept := _kept_id(path, say)) is not None:
        return kept
    write_text(path, (new := secrets.token_hex(8)) + "\n")
    return new


def _kept_id(path: Path, say: Say) -> str | None:
    """Return the id in a file of the run; None if there is none, or only that of a copied run.

    A copy of a run would otherwise write into the run of the original at the service.
    """
    if not path.exists():
        return None
    kept, original = path.read_text().strip(), _earlier_folder(path.parent)
    if original is None or original.resolve() == path.parent.resolve():
        return kept
    of_original = original / path.name
    if not of_original.is_file() or of_original.read_text().strip() != kept:
        return kept  # the run was moved
    say(f"{path.parent} is a copy of {original}: it becomes another run than {kept} ({path.name})")
    return None


def _earlier_folder(run_dir: Path) -> Path | None:
    """Return the run.dir of the job before, if its configuration is there."""
    with suppress(OSError, UserError):
        return load(RunConfig, run_dir / "config.yaml", from_checkpoint=True).run.dir
    return None


def _mlflow_run(client: Any, config: RunConfig, say: Say) -> str:
    """Return the id of the run at MLflow, which is created by the first job."""
    from mlflow.entities import Param

    path = config.run.dir / "mlflow_run_id"
    if (run_id := _kept_id(path, say)) is not None:
        client.update_run(run_id, status="RUNNING")  # fails if the run is not there
        return run_id
    name = config.log.mlflow_experiment
    experiment = client.get_experiment_by_name(name)
    identity = client.create_experiment(name) if experiment is None else experiment.experiment_id
    run_id = client.create_run(identity, run_name=config.run.dir.name).info.run_id
    settings = [Param(k, str(value)[:500]) for k, value in leaves(config.model_dump(mode="json"))]
    for some in batched(settings, 100):  # MLflow's bound for one request
        client.log_batch(run_id, params=some)
    write_text(path, run_id + "\n")
    return run_id


def _mlflow_name(name: str) -> str:
    """Return the name of a metric with only the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


@contextmanager
def _few_retries() -> Iterator[None]:
    """Let MLflow give up after some seconds instead of minutes, unless the user has chosen."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "2"
    try:
        yield
    finally:
        del os.environ[name]
