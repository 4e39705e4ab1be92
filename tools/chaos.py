#!/usr/bin/env python3
"""Inject faults of clusters into training jobs, and report what was lost and how jobs recovered.

    for each fault:  run a job with the fault  ->  run the command again  ->  compare losses, which
                                                       must equal those of an undisturbed run

Writes the table of docs/reliability.md. Jobs are forked from this process, which has imported
everything, so that the measured seconds do not include Python's imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import chaos_faults as faults  # noqa: E402
import disks  # noqa: E402
import memory_groups  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from chaos_faults import Fault  # noqa: E402
from disks import Disk  # noqa: E402
from hosts import Hosts, missing  # noqa: E402

from megatron_moe.checkpoint.folder import complete, newest  # noqa: E402
from megatron_moe.config.load import load  # noqa: E402
from megatron_moe.config.run import RunConfig  # noqa: E402
from megatron_moe.errors import UserError  # noqa: E402
from megatron_moe.hf.disk import disk_errors_in_words  # noqa: E402
from megatron_moe.markdown import markdown_table  # noqa: E402
from megatron_moe.runtime import cpu  # noqa: E402
from megatron_moe.runtime.launchers import position_from_environment  # noqa: E402
from megatron_moe.runtime.world import World, joined, run_local_ranks  # noqa: E402

RANKS, MANY_HOSTS = 2, 4
MANY_HANG_SECONDS = 30.0
"""``guard.hang_seconds`` of the job on many hosts, which share the cores of one."""
LINE_CHARACTERS = 110
"""Upper bound for a message in the table; the whole one follows below it."""
MEMORY_BYTES = 3 * 2**30
"""Limit of the cgroup of a row: far more than its ranks need."""
FILE_SYSTEM_BYTES = 2 * 2**20
"""Storage that an empty ext4 takes, and some room for logs."""
EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "tokens/seen", "router/load_imbalance")
TABLE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table by make chaos -->\n", "<!-- end of table -->\n"
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
        kinds = ("Stopped by", "cannot ", "  Retrying", "  Training")
        remarks = [line for line in lines[:end] if line.startswith(kinds)]
        return "\n".join([*dict.fromkeys(remarks), *lines[end:]])


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table."""

    fault: str
    message: str
    ended_seconds: float
    """Seconds from the fault to the end of the job."""
    steps_again: int
    """Number of steps that had to be repeated."""
    recover_seconds: float
    """Seconds from the restart to the first new step."""
    problem: str = ""
    """Why the fault was not survived."""

    @property
    def first_line(self) -> str:
        """First line of the message, without names of files, and not too long for a table."""
        line = self.message.partition("\n")[0] or "nothing"
        line = re.sub(r"[^\s(]+/([^\s/]+)", r"\1", line).replace("|", " ")
        return line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}..."


class Stage:
    """A tiny dense model, its text, and the losses of an undisturbed run."""

    def __init__(self, root: Path, hosts: Hosts | None = None, *, ranks: int = RANKS) -> None:
        from tiny import save_dense
        from training_runs import write_tokens

        self.root, self.hosts, self.ranks = root, hosts, ranks
        save_dense(root / "dense")
        write_tokens(root / "tokens")
        undisturbed = self.run_dir("undisturbed")
        ended = self.job(undisturbed)
        assert ended.exit_code == 0, ended.output
        self.expected = exact_lines(undisturbed)

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
            CONFIG.format(
                run_dir=run_dir, root=self.root, steps=faults.STEPS, interval=faults.INTERVAL
            )
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
            if message is None and step >= faults.BLOW_STEP:
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

    with disk_errors_in_words(config.run.dir):
        train(config, world, partial(fault.observe, world.rank))


def inject(stage: Stage, fault: Fault) -> Outcome:
    """Run a job with the fault, restart it, and compare the losses.

    Raises:
        AssertionError: The fault was not detected, or the resumed run has other losses.
    """
    run_dir = stage.run_dir(fault.name)
    disk = None if fault.disk is None else fault.disk(run_dir)
    with disk or contextlib.nullcontext():
        if fault.resumes:
            interrupted = stage.job(run_dir, faults.signaled(signal.SIGTERM))
            assert interrupted.exit_code == 0, interrupted.output
        if fault.damage is faults.nothing:
            broken = stage.job(run_dir, fault)
            assert (broken.exit_code == 0) == fault.ends_well, broken.output
        else:
            interrupted = stage.job(run_dir, faults.signaled(signal.SIGTERM))  # leaves steps to run
            assert interrupted.exit_code == 0, interrupted.output
            fault.damage(run_dir)
            broken = stage.job(run_dir)
            assert broken.exit_code == 2, broken.output
            _follow_the_way_out(run_dir, broken.message)
        check_output(fault, broken.output)
        reached, saved = last_step(run_dir), newest(run_dir)
        saved_step = int(saved.name.removeprefix("step_")) if saved else 0
        if disk is not None:
            disk.repair()
        recovered = stage.job(run_dir, Fault(name="none", on_hosts=fault.on_hosts))
        assert recovered.exit_code == 0, recovered.output
        check_output(fault, recovered.output)
        assert exact_lines(run_dir) == stage.expected, (
            f"{fault.name}: losses differ\n{recovered.output}"
        )
        assert not list(run_dir.glob("checkpoints/.step*")), "an incomplete checkpoint is left"
        assert not (run_dir / "executed").exists(), "code of a checkpoint was executed"
        return Outcome(
            fault.name,
            broken.message.replace(f"{stage.root}/", ""),
            broken.seconds,
            reached - saved_step,
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


def all_faults(stage: Stage, checkpoint_bytes: int, memory: Path | None) -> list[Fault]:
    """Return the faults of all rows of the table, in order."""
    stages = ("forward", "backward", "optimizer", "save")
    room = checkpoint_bytes * 3 // 2
    rows = [
        *(faults.kill(rank, "load", 0) for rank in range(RANKS)),
        *(
            faults.kill(rank, name, 6 if name == "save" else faults.FAULT_STEP)
            for name in stages
            for rank in range(RANKS)
        ),
        *(
            faults.kill_half_written(rank, async_save=async_save)
            for async_save in (False, True)
            for rank in range(RANKS)
        ),
        faults.kill_before_name(),
        faults.kill_job(),
        faults.signaled(signal.SIGTERM),
        faults.signaled(signal.SIGUSR1),
        faults.stopped(1),
        faults.stopped(0),
        faults.hanging(1),
        faults.truncated_shard(),
        faults.flipped_bit("__1_0.distcp"),
        faults.flipped_bit("checkpoint.json"),
        faults.flipped_bit("source/config.json"),
        faults.corrupted_index(),
        faults.index_that_names_code(),
        faults.second_job(lambda run_dir: stage.job(run_dir, log_name="second").message),
        faults.flipped_gradient(1),
    ]
    if stage.hosts is not None:
        rows += [
            faults.cut_off(stage.hosts, "load", 0),
            faults.cut_off(stage.hosts, "forward"),
            faults.cut_off(stage.hosts, "save", 6),
            faults.cut_off(stage.hosts, "forward", seconds=3),
            faults.slow_network(stage.hosts, 0.2, 0.01),
            faults.folder_fails_on_a_host(),
            faults.late_files(5),
            faults.unknown_name(),
        ]
    if disks.missing() is None:
        rows += [
            faults.disk_full(room, room_is_made=False),
            faults.disk_full(room, room_is_made=True),
            faults.disk_spoiled("no byte left, TensorBoard on", Disk.fill, "log.tensorboard=true"),
            faults.disk_spoiled("no inodes left", Disk.take_inodes),
            faults.disk_fails(),
            faults.fsync_fails(room + FILE_SYSTEM_BYTES),
        ]
    if memory is not None:
        rows.append(faults.out_of_memory(memory, 1))
    return rows


def table(outcomes: list[Outcome]) -> str:
    """Return the rows as Markdown, followed by the messages."""
    head = (
        "fault", "the operator saw", "steps taken again", "job ended after (s)",
        "first new step after restart (s)", "equal to the undisturbed run",
    )  # fmt: skip
    cells = (
        (
            o.fault, o.first_line, o.steps_again, f"{o.ended_seconds:.1f}",
            f"{o.recover_seconds:.1f}", "no: " + o.problem if o.problem else "yes",
        )
        for o in outcomes
    )  # fmt: skip
    survived = sum(not o.problem for o in outcomes)
    rows = [
        f"{len(outcomes)} faults were injected on {time.strftime('%Y-%m-%d')}, and {survived} were "
        f"survived: the resumed run is equal to the undisturbed one. The load of the machine was "
        f"{os.getloadavg()[2]:.0f} at the end.",
        "",
        markdown_table(head, cells),
        "What the operator saw, word for word:",
        "",
    ]
    for outcome in outcomes:
        rows += [
            f"{outcome.fault}",
            "",
            "```",
            outcome.message or "(nothing)",
            "```",
            "",
        ]
    return "\n".join(rows)


def tried(stage: Stage, fault: Fault) -> Outcome:
    """Return the row of a fault; if a check fails, it says which, and its output is printed."""
    try:
        return inject(stage, fault)
    except AssertionError as error:
        print(f"{fault.name}: {error}", file=sys.stderr, flush=True)
        problem = str(error).splitlines()[0] if str(error) else "a check failed"
        return Outcome(fault.name, "", 0, 0, 0, problem[:80])


def main() -> None:
    """Inject all faults (or those whose name contains the arguments) and write the table."""
    torch.set_num_threads(1)
    cpu.install()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        hosts = many = memory = None
        if missing() is None:
            hosts, many = (stack.enter_context(Hosts(n)) for n in (RANKS, MANY_HOSTS))
        if memory_groups.missing() is None:
            memory = stack.enter_context(memory_groups.limited_memory(MEMORY_BYTES))
        stage = Stage(folder, hosts)
        one = complete(folder / "undisturbed")[0]
        size = sum(file.stat().st_size for file in one.rglob("*") if file.is_file())
        rows = [(stage, fault) for fault in all_faults(stage, size, memory)]
        if many is not None:
            (folder / "many").mkdir()
            large = Stage(folder / "many", many, ranks=MANY_HOSTS)
            rows.append((large, faults.cut_off(many, "forward", hang_seconds=MANY_HANG_SECONDS)))
        chosen = [row for row in rows if all(a in row[1].name for a in sys.argv[1:])]
        outcomes = []
        for number, (where, fault) in enumerate(chosen, 1):
            outcomes.append(tried(where, fault))
            last = outcomes[-1]
            print(
                f"{number}/{len(chosen)} {fault.name}: {last.steps_again} steps repeated, "
                f"{last.recover_seconds:.1f} s to the first new step",
                flush=True,
            )
            shutil.rmtree(where.root / re.sub(r"\W+", "-", fault.name), ignore_errors=True)
    if len(sys.argv) == 1:
        head, _, rest = TABLE.read_text().partition(BEGIN)
        TABLE.write_text(head + BEGIN + table(outcomes) + END + rest.partition(END)[2])
        print(f"wrote the table of {TABLE.relative_to(ROOT)}")
    sys.exit(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    main()
