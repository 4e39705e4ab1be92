"""Keep the newest state on disks of the nodes: each rank's file on its own node and on the next.

::

    node 0    rank_0 rank_1   and copies of rank_2 rank_3
    node 1    rank_2 rank_3   and copies of rank_0 rank_1

A restart with the same layout takes the newest step of which every rank's file exists on some node,
undamaged; a node that lost its disk gets the files from its neighbor. Files are used only if they
were written after the checkpoint that the run resumes from, so an operator who goes back to an
older checkpoint gets that one.

A step appears under its name when all ranks have written and copied it, and the step before it is
removed after that on all nodes. So there is a complete step at any time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.checkpoint.disks import Disks, exchange, find_disks
from megatron_moe.checkpoint.folder import newest
from megatron_moe.checkpoint.names import STEP, name_of
from megatron_moe.checkpoint.rank_file import (
    RankState,
    bytes_file,
    read_rank_file,
    read_state,
    write_rank_file,
)
from megatron_moe.checkpoint.sharded import (
    adopt_progress,
    all_boxes,
    clear,
    new_group,
    progress_of,
    together,
)
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import FILE, checksum
from megatron_moe.hf.disk import fsync, make_folder, refusal
from megatron_moe.train.state import TrainState

_REPORTED = 4
"""Number of damaged files whose names are logged."""


@dataclass(frozen=True, slots=True)
class LocalStep:
    """A step that all ranks can be restored from; the same on every rank but for ``state``."""

    folder: Path
    state: RankState
    """State of this rank."""

    @torch.no_grad()
    def restore(self, state: TrainState, groups: ProcessGroupCollection) -> None:
        """Restore the state of this rank.

        Raises:
            CheckpointError: The rank has other tensors than the file.
        """
        clear(state.model)  # rows that pad the vocabulary are in no box
        read_rank_file(self.folder, self.state, all_boxes(state, groups))
        adopt_progress(state, self.state.progress, tokens=self.state.progress.tokens or 0)


class LocalCopies:
    """Write and find the local copies of a run; all ranks call each method together.

    Args:
        config: The run's configuration, with ``checkpoint.local_dir``.
        plan_hash: Hash of the expert plan.
        say: Logs a line on rank 0.

    Raises:
        ConfigError: The folder cannot be written to, or nodes have different numbers of ranks.
    """

    def __init__(self, config: RunConfig, *, plan_hash: str, say: Callable[[str], None]) -> None:
        assert config.checkpoint.local_dir is not None
        run = config.run.dir.resolve()
        self._folder = config.checkpoint.local_dir / f"{run.name}-{checksum(bytes(run))[:8]}"
        make_folder(self._folder, "checkpoint.local_dir")
        self._config, self._plan_hash, self._say = config, plan_hash, say
        self._rank, self._group = dist.get_rank(), new_group()
        self._disks = find_disks(self._folder, self._group)
        if len(self._disks.ranks) == 1:
            say(
                f"All ranks use the same disk at {self._folder}: local copies do not survive the "
                "loss of it"
            )

    def save(self, state: TrainState, groups: ProcessGroupCollection) -> None:
        """Write the state of this step to this node and the next one, if the run has a checkpoint.

        If a disk refuses it, the older copy stays, and training continues.
        """
        start, base = time.perf_counter(), self._base(newest(self._config.run.dir))
        if base is None:
            return
        final = self._folder / name_of(state.step)
        partial = final.with_name(f".{final.name}.partial")
        try:
            self._together(partial, lambda: self._start(partial), first=True)
            self._together(partial, lambda: self._write(state, groups, partial, base))
            self._together(partial, lambda: self._copy(partial))
            self._together(partial, lambda: _publish(partial, final), first=True)
        except CheckpointError as error:
            self._say(f"{error}\n  Training continues; the last local copy stays.")
            if self._disks.leads(self._rank):
                shutil.rmtree(partial, ignore_errors=True)
            return
        if self._disks.leads(self._rank):
            for folder in set(self._folder.glob("*step_*")) - {final}:
                shutil.rmtree(folder, ignore_errors=True)
        self._say(f"Wrote local copies of step {state.step} in {time.perf_counter() - start:.1f} s")

    def find(self, checkpoint: Path) -> LocalStep | None:
        """Return the newest complete step written since ``checkpoint``; None if there is none.

        A rank whose disk has no undamaged file of it gets one from another node. Damaged files are
        logged.
        """
        base = self._base(checkpoint)
        readable, damaged = self._readable()
        listed = self._gathered([state for state in readable if state.base == base])
        any_damaged = self._report(damaged)
        fitting = [[state for state in states if self._fits(state)] for states in listed]
        holders = _holders(fitting, self._disks)
        steps = [step for step, of_rank in holders.items() if len(of_rank) == len(listed)]
        if not steps:
            if any(listed) or any_damaged:
                other = any(listed) and not any(fitting)
                why = "have another layout" if other else "are incomplete or damaged"
                self._say(f"Local copies in {self._folder} {why}: {checkpoint.name} is used")
            return None
        return self._on_all_disks(max(steps), holders[max(steps)], checkpoint)

    def _on_all_disks(
        self, step: int, holders: dict[int, list[int]], checkpoint: Path
    ) -> LocalStep | None:
        """Copy missing files to their ranks; return the step, or None if that fails on a rank."""
        folder, state, problems = self._folder / name_of(step), None, []
        try:
            self._fetch(folder, holders)
            state = read_state(bytes_file(folder, self._rank).with_suffix(".json"))
        except (OSError, CheckpointError) as error:
            problems = [refusal(error, folder) if isinstance(error, OSError) else str(error)]
        if self._report(problems):
            self._say(f"Local copies of step {step} cannot be read: {checkpoint.name} is used")
            return None
        assert state is not None, "no rank has a problem"
        lost = len(self._lost(holders))
        copied = f"; the files of {lost} ranks came from other nodes" if lost else ""
        self._say(f"Local copies of step {step} were written after {checkpoint.name}{copied}")
        return LocalStep(folder, state)

    def _report(self, problems: list[str]) -> bool:
        """Log problems of all ranks, the first of them in words; return whether there are any."""
        host = socket.gethostname()
        gathered = self._gathered([f"{problem} ({host})" for problem in problems])
        lines = [line for of_rank in gathered for line in of_rank]
        for line in lines[:_REPORTED]:
            self._say(f"Local copy not used: {line}")
        if more := len(lines[_REPORTED:]):
            self._say(f"{more} more local copies are not used, for such reasons")
        return bool(lines)

    def _gathered[T](self, own: T) -> list[T]:
        """Return the values of all ranks."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, own, group=self._group)
        return values

    def _base(self, checkpoint: Path | None) -> str | None:
        """Return what identifies a checkpoint, as rank 0 sees it."""
        seen: list[Any] = [None]
        if self._rank == 0 and checkpoint is not None:
            sums = checkpoint / FILE
            content = sums.read_bytes() if sums.exists() else b""
            seen = [f"{checkpoint.name} {checksum(content)}"]
        dist.broadcast_object_list(seen, src=0, group=self._group)
        return seen[0]

    def _layout(self, step: int) -> str:
        config = self._config
        decisive = [
            dist.get_world_size(), config.parallel.model_dump(), config.train.precision,
            config.optimizer.optimizer, config.optimizer.use_distributed_optimizer,
            config.optimizer.exp_avg_dtype, config.optimizer.exp_avg_sq_dtype,
            sorted(config.frozen_after(step).names()),
        ]  # fmt: skip
        return checksum(json.dumps(decisive).encode())

    def _fits(self, state: RankState) -> bool:
        progress = state.progress
        return (state.layout, progress.plan_hash) == (self._layout(progress.step), self._plan_hash)

    def _readable(self) -> tuple[list[RankState], list[str]]:
        """Return the undamaged files of this disk, and the problems of all others.

        The ranks of the disk divide the reading.
        """
        ranks = self._disks.ranks[self._disks.of(self._rank)]
        folders = [f for f in self._folder.glob("step_*") if STEP.fullmatch(f.name)]
        files = sorted(file for folder in folders for file in folder.glob("rank_*.json"))
        states, problems = [], []
        for file in files[ranks.index(self._rank) :: len(ranks)]:
            try:
                states.append(read_state(file))
            except CheckpointError as error:
                problems.append(str(error))
        return states, problems

    def _start(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    @torch.no_grad()
    def _write(
        self, state: TrainState, groups: ProcessGroupCollection, partial: Path, base: str
    ) -> None:
        state.gather_weights()
        write_rank_file(
            partial,
            all_boxes(state, groups),
            rank=self._rank,
            layout=self._layout(state.step),
            base=base,
            progress=progress_of(state, self._config, self._plan_hash),
        )

    def _copy(self, partial: Path) -> None:
        """Send this rank's files to the next disk, and receive those of the disk before."""
        if len(self._disks.ranks) == 1:
            return
        to, sender = (self._disks.neighbor(self._rank, shift) for shift in (1, -1))
        for suffix in (".bin", ".json"):
            exchange(
                bytes_file(partial, self._rank).with_suffix(suffix), to,
                bytes_file(partial, sender).with_suffix(suffix), sender, self._group,
            )  # fmt: skip

    def _lost(self, holders: dict[int, list[int]]) -> list[int]:
        """Return the ranks whose disk has no file of theirs."""
        return [rank for rank in sorted(holders) if self._disks.of(rank) not in holders[rank]]

    def _fetch(self, folder: Path, holders: dict[int, list[int]]) -> None:
        """Copy files to ranks whose disk has none.

        Raises:
            OSError: This rank's disk refuses them. All ranks have completed their transfers.
        """
        failures: list[OSError] = []
        with _kept(failures):
            folder.mkdir(parents=True, exist_ok=True)
        for rank in self._lost(holders):
            sender = self._disks.ranks[holders[rank][0]][0]
            if self._rank not in (rank, sender):
                continue
            for suffix in (".bin", ".json"):
                file = bytes_file(folder, rank).with_suffix(suffix)
                with _kept(failures):
                    if self._rank == sender:
                        exchange(file, rank, None, sender, self._group)
                    else:
                        exchange(None, sender, file, sender, self._group)
        if failures:
            raise failures[0]

    def _together(self, folder: Path, do: Callable[[], object], *, first: bool = False) -> None:
        """Run ``do`` on every rank, or on the first of each disk; if it fails on one, all raise."""
        runs = not first or self._disks.leads(self._rank)
        together(self._group, folder, lambda: do() if runs else None)


@contextlib.contextmanager
def _kept(failures: list[OSError]) -> Iterator[None]:
    """Add an error of the disk to a list instead of raising it."""
    try:
        yield
    except OSError as error:
        failures.append(error)


def _publish(partial: Path, final: Path) -> None:
    fsync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    fsync(final.parent)


def _holders(listed: list[list[RankState]], disks: Disks) -> dict[int, dict[int, list[int]]]:
    """Return the disks that hold each rank's file, by step and rank."""
    holders: dict[int, dict[int, list[int]]] = {}
    for reader, states in enumerate(listed):
        for state in states:
            of_step = holders.setdefault(state.progress.step, {})
            of_step.setdefault(state.rank, []).append(disks.of(reader))
    return holders
