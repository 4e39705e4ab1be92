"""Run a tiny job with a fault, then the same command again, as ``make chaos`` and tests do.

    for each fault:  run a job with the fault  ->  run the command again  ->  compare losses, which
                                                       must equal those of an undisturbed run

Jobs are forked from this process, which has imported everything, so that the measured seconds do
not include Python's imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import torch.multiprocessing as mp  # noqa: E402
from chaos_table import Outcome  # noqa: E402
from faults.fault import BLOW_STEP, INTERVAL, STEPS, Fault, node_folder, nothing  # noqa: E402
from faults.processes import signaled  # noqa: E402
from hosts import Hosts  # noqa: E402

from megatron_moe.config.load import load  # noqa: E402
from megatron_moe.config.run import RunConfig  # noqa: E402
from megatron_moe.errors import UserError  # noqa: E402
from megatron_moe.hf.disk import disk_errors_in_words  # noqa: E402
from megatron_moe.runtime.launchers import position_from_environment  # noqa: E402
from megatron_moe.runtime.world import World, joined, run_local_ranks  # noqa: E402

RANKS = 2
EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "tokens/seen", "router/load_imbalance")
CONFIG = """\
run: {{dir: {run_dir}, device: cpu}}
source: {{path: {root}/dense}}
moe: {{num_moe_experts: 4}}
parallel: {{expert_parallel_size: 2}}
data: {{path: {root}/tokens, seq_length: 32}}
train: {{steps: {steps}, global_batch_size: 4, precision: bf16}}
optimizer: {{lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 1}}
checkpoint: {{interval: {interval}, keep: 3}}
upcycle: {{verify: never}}
log: {{tensorboard: false}}
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """Exit status, output and duration of a job."""

    exit_code: int
    output: str
    seconds: float
    seconds_to_first_step: float | None

    @property
    def message(self) -> str:
        """The messages that the operator saw."""
        lines = self.output.splitlines()
        first = [i for i, line in enumerate(lines) if re.match(r"(rank \d+: )?\w+Error: ", line)]
        end = first[0] if first else len(lines)
        kinds = ("Stopped by", "cannot ", "  Retrying", "  Training", "Refused ")
        remarks = [line for line in lines[:end] if line.startswith(kinds)]
        return "\n".join([*dict.fromkeys(remarks), *lines[end:]])


class Stage:
    """A tiny dense model, its text, and the losses of an undisturbed run."""

    def __init__(self, root: Path, hosts: Hosts | None = None, *, ranks: int = RANKS) -> None:
        from tiny import save_dense
        from training_runs import write_tokens

        self.root, self.hosts, self.ranks = root, hosts, ranks
        save_dense(root / "dense")
        write_tokens(root / "tokens")

    @cached_property
    def undisturbed(self) -> Path:
        """Folder of a run without a fault."""
        folder = self.run_dir("undisturbed")
        ended = self.job(folder)
        assert ended.exit_code == 0, ended.output
        return folder

    @cached_property
    def expected(self) -> list[dict[str, Any]]:
        """Numbers of each step of that run, which those of all others must equal."""
        return exact_lines(self.undisturbed)

    def run_dir(self, name: str) -> Path:
        """Create a run folder."""
        path = self.root / re.sub(r"\W+", "-", name)
        path.mkdir()
        return path

    def job(
        self, run_dir: Path, fault: Fault | None = None, *, log_name: str | None = None
    ) -> Ended:
        """Run a job to its end, as ``megatron-moe train`` does, optionally with a fault."""
        config_file = run_dir.parent / f"{run_dir.name}.yaml"
        config_file.write_text(
            CONFIG.format(run_dir=run_dir, root=self.root, steps=STEPS, interval=INTERVAL)
        )
        fault = fault or Fault(name="none")
        config = load(RunConfig, config_file, list(fault.changes))
        log = run_dir.parent / f"{log_name or run_dir.name}.log"
        before, start = last_step(run_dir), time.monotonic()
        hosts = self.hosts if fault.on_hosts else None
        if hosts is not None:
            hosts.heal()
        arguments = (config, fault, log, hosts, self.ranks)
        process = mp.get_context("fork").Process(target=_job, args=arguments)
        process.start()
        first_step, message = None, None
        while process.is_alive():
            process.join(0.02)
            step = last_step(run_dir)
            if first_step is None and step > before:
                first_step = time.monotonic() - start
            if message is None and step >= BLOW_STEP:
                message = fault.on_job(process.pid or 0, run_dir) or ""
        seconds = time.monotonic() - start
        return Ended(process.exitcode or 0, message or log.read_text(), seconds, first_step)


def _job(config: RunConfig, fault: Fault, log: Path, hosts: Hosts | None, ranks: int) -> None:
    """Run the first process of a job: output goes to a file, errors are printed as by the CLI."""
    file = log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file  # pytest has replaced them
    fault.prepare(config.run.dir)
    if hosts is not None:
        os._exit(hosts.run_ranks(partial(_rank_on_a_host, config, fault)))
    try:
        run_local_ranks(partial(_rank, config, fault), ranks=ranks, device="cpu")
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def _rank_on_a_host(config: RunConfig, fault: Fault) -> None:
    if fault.environment is not None and os.environ["RANK"] == "1":
        os.environ.update([fault.environment])
    position = position_from_environment()
    assert position is not None
    try:
        with joined(position, "cpu") as world:
            _rank(config, fault, world)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def _rank(config: RunConfig, fault: Fault, world: World) -> None:
    from megatron_moe.commands.train import train

    if fault.local_copies:
        local = {"local_dir": node_folder(config.run.dir, world.rank), "local_interval": 1}
        checkpoint = config.checkpoint.model_copy(update=local)
        config = config.model_copy(update={"checkpoint": checkpoint})
    with disk_errors_in_words(config.run.dir):
        train(config, world, partial(fault.observe, world.rank))


def inject(stage: Stage, fault: Fault) -> Outcome:
    """Run a job with the fault, restart it, and compare the losses.

    Raises:
        AssertionError: The fault was not detected, or the resumed run has other losses.
    """
    expected, run_dir = stage.expected, stage.run_dir(fault.name)
    disk = None if fault.disk is None else fault.disk(run_dir)
    with disk or contextlib.nullcontext():
        if fault.resumes:
            interrupted = stage.job(run_dir, signaled(signal.SIGTERM))
            assert interrupted.exit_code == 0, interrupted.output
        if fault.damage is nothing:
            broken = stage.job(run_dir, fault)
            assert (broken.exit_code == 0) == fault.ends_well, broken.output
        else:
            interrupted = stage.job(run_dir, signaled(signal.SIGTERM))  # leaves steps to run
            assert interrupted.exit_code == 0, interrupted.output
            fault.damage(run_dir)
            broken = stage.job(run_dir)
            assert broken.exit_code == 2, broken.output
            _follow_the_way_out(run_dir, broken.message)
        check_output(fault, broken.output)
        reached = last_step(run_dir)
        fault.before_restart(run_dir)
        if disk is not None:
            disk.repair()
        restart = Fault(name="none", on_hosts=fault.on_hosts, local_copies=fault.local_copies)
        recovered = stage.job(run_dir, restart)
        assert recovered.exit_code == 0, recovered.output
        check_output(fault, recovered.output)
        assert exact_lines(run_dir) == expected, f"{fault.name}: losses differ\n{recovered.output}"
        assert not list(run_dir.glob("checkpoints/.step*")), "an incomplete checkpoint is left"
        assert not (run_dir / "executed").exists(), "code of a checkpoint was executed"
        resumed = re.search(r"^Resumed .* at step (\d+)$", recovered.output, re.MULTILINE)
        return Outcome(
            fault.name,
            broken.message.replace(f"{stage.root}/", ""),
            broken.seconds,
            reached - int(resumed[1] if resumed else 0),
            recovered.seconds_to_first_step or recovered.seconds,
        )


def check_output(fault: Fault, output: str) -> None:
    """Raise AssertionError if the operator had to read a traceback of a library's threads."""
    result = re.search(r"Traceback \(most recent|Exception in thread|terminate called", output)
    assert result is None, f"{fault.name}: the output contains a traceback\n{output}"


def _follow_the_way_out(run_dir: Path, message: str) -> None:
    """Follow the way out in the message about a damaged checkpoint."""
    pointer = run_dir / "checkpoints" / "latest"
    named = re.search(r"write (step_\d+) into", message)
    if named:
        pointer.write_text(named[1] + "\n")
    else:
        assert f"remove {pointer}" in message, message
        pointer.unlink()


def exact_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the numbers of each step that must agree exactly."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: line.get(name) for name in EXACT} for line in map(json.loads, lines)]


def last_step(run_dir: Path) -> int:
    """Return the newest step in the run folder's metrics, or 0."""
    with contextlib.suppress(OSError):
        for line in reversed((run_dir / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):  # the last one may be half written
                return json.loads(line)["step"]
    return 0
