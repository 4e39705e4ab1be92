"""Save and restore a training state, shard by shard; any layout can load what another saved.

Tensors are stored under global names (layer and expert numbers of the whole model), without a
gather: weights, moments and, with bf16 weights, fp32 master weights as ``optimizer.*``. No random
state is saved, because training draws no random numbers: the order of the data is a function of
its seed, and the schedule is a function of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.checkpoint import folder as folders
from megatron_moe.checkpoint.boxes import Box, Placement, placements
from megatron_moe.checkpoint.folder import Progress
from megatron_moe.checkpoint.host import copied_to_host
from megatron_moe.checkpoint.moments import (
    Owned,
    owned,
    set_updates_made,
    updates_by_role,
    updates_made,
)
from megatron_moe.checkpoint.storage import Boxes, read_boxes, write_boxes, write_format
from megatron_moe.config.load import dump
from megatron_moe.config.parts import updates_of
from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import BlendState
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import Blocks, write_checksums
from megatron_moe.hf.disk import refusal
from megatron_moe.model.build import Model
from megatron_moe.train.state import TrainState


class Saver:
    """Write a run's checkpoints, one at a time, inside a ``with`` block; every rank has a saver.

    With ``checkpoint.async_save`` a save returns immediately. This rank's tensors are copied to
    host memory during the next forward and backward pass, which do not change them; `before_update`
    waits for these copies. Files are then written in the background while training continues. The
    next save and the end of the ``with`` block wait for them and raise any write errors.

    Args:
        config: The run's configuration.
        plan_hash: Hash of the expert plan, which a resume checks.
        say: Logs that a checkpoint is complete; called on rank 0, possibly from another thread.
    """

    def __init__(self, config: RunConfig, *, plan_hash: str, say: Callable[[str], None]) -> None:
        self._config, self._plan_hash, self._say = config, plan_hash, say
        # A separate group, because the thread's collectives must not mix with those of training.
        # gloo, because ranks exchange plans and not tensors.
        self._group = new_group()
        self._thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="checkpoint",
            # A new thread starts on GPU 0, where every rank's first call would create a context.
            initializer=torch.cuda.set_device,
            initargs=(torch.cuda.current_device(),),
        )
        self._pending: Future[None] | None = None
        self._copied = Event()
        self._copied.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        self._thread.shutdown(wait=error is None)

    def save(self, state: TrainState, groups: ProcessGroupCollection) -> None:
        """Write a checkpoint of the current step; it appears under its name only when complete.

        Raises:
            CheckpointError: On every rank, if this save (or the previous one, written in the
                background) failed on any rank; earlier checkpoints are untouched.
        """
        self.wait()
        start = time.perf_counter()
        with torch.no_grad():
            state.gather_weights()
        trained = state.step or updates_made(state.optimizer)  # otherwise masters equal weights
        kept = owned(state.optimizer) if trained else ()
        boxes = _boxes(state, groups, kept, writing=True)
        progress = progress_of(state, self._config, self._plan_hash)
        if self._config.checkpoint.async_save:
            boxes = _copied_to_host(boxes, _only_small)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            self._copied.clear()
            self._pending = self._thread.submit(
                self._copy_and_write, boxes, stream, progress, start
            )
        else:
            self._write(boxes, progress, start)

    def before_update(self) -> None:
        """Wait until weights and optimizer may change, because all tensors to save are copied."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait until the background save is complete.

        Raises:
            CheckpointError: On every rank, if that save failed on any rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copy_and_write(
        self, boxes: Boxes, stream: torch.cuda.Stream, progress: Progress, start: float
    ) -> None:
        try:
            with torch.cuda.stream(stream):
                copies = _copied_to_host(boxes, lambda tensor: not _only_small(tensor))
        finally:
            self._copied.set()
        self._write(copies, progress, start)

    def _write(self, boxes: Boxes, progress: Progress, start: float) -> None:
        config, group = self._config, self._group
        final = folders.step_folder(config.run.dir, progress.step)
        partial = folders.partial_of(final)
        leads = dist.get_rank() == 0
        try:
            together(group, partial, lambda: folders.start_folder(final) if leads else None)
            blocks = write_boxes(boxes, partial, group)
            together(
                group,
                partial,
                lambda: self._publish(progress, partial, final, blocks) if leads else None,
            )
        except CheckpointError:
            if leads:
                folders.give_up(partial)
            raise
        if leads:
            self._say(f"Saved {final} in {time.perf_counter() - start:.1f} s")

    def _publish(self, progress: Progress, partial: Path, final: Path, blocks: Blocks) -> None:
        config = self._config
        write_format(partial)
        folders.describe(partial, progress, dump(config), config.source.path)
        write_checksums(partial, blocks)
        folders.publish(partial, final)
        folders.prune(config.run.dir, config.checkpoint.keep)


def progress_of(state: TrainState, config: RunConfig, plan_hash: str) -> Progress:
    """Return what checkpoint.json holds; all ranks must call it."""
    return Progress(
        step=state.step,
        samples=state.samples,
        tokens=state.tokens,
        plan_hash=plan_hash,
        optimizer_updates=updates_made(state.optimizer),
        updates_by_role=updates_by_role(state.optimizer),
        world_size=dist.get_world_size(),
        precision=config.train.precision,
        blend=state.blend.to_json(),
        balance=_by_name(state.balance),
        unused_steps=_by_name(state.unused_steps),
    )


def _by_name[T](of_layers: dict[int, T] | None) -> dict[str, T] | None:
    """Return values of layers under names, because JSON has no other keys."""
    return None if of_layers is None else {str(layer): value for layer, value in of_layers.items()}


def new_group() -> dist.ProcessGroup:
    """Create a group of all ranks whose collectives do not mix with those of training."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def together(group: dist.ProcessGroup, folder: Path, do: Callable[[], object]) -> None:
    """Run ``do``, which writes to ``folder``, on every rank; if it fails on one, all raise."""
    problem = None
    try:
        do()
    except (OSError, CheckpointError) as error:
        words = refusal(error, folder) if isinstance(error, OSError) else str(error)
        problem = f"rank {dist.get_rank()}: {words}"
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    if messages := [problem for problem in problems if problem is not None]:
        raise CheckpointError("cannot save: " + "; ".join(messages))


@torch.no_grad()
def restore(
    state: TrainState,
    folder: Path,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    plan_hash: str,
) -> None:
    """Restore weights, optimizer, schedule and the position in the data from ``folder``.

    Raises:
        CheckpointError: The checkpoint has another model or precision, or is damaged.
    """
    progress = _checked_progress(folder, config, plan_hash)
    by_role = progress.updates_by_role
    stored, new = [], []
    for kept in owned(state.optimizer):
        frozen = by_role is not None and updates_of(by_role, str(kept.label)) is None
        trained = progress.step or progress.optimizer_updates
        (new if frozen or not trained else stored).append(kept)
    boxes = _boxes(state, groups, stored, writing=False)
    clear(state.model)
    for kept in (*stored, *new):
        for tensor in kept.tensors.values():
            tensor.zero_()
    _read(boxes, folder)
    for kept in new:
        _copy_to_master(kept)
    adopt_progress(state, progress, tokens=folders.tokens_of(progress, folder))


def adopt_progress(state: TrainState, progress: Progress, *, tokens: int) -> None:
    """Set the optimizer's count of updates, the schedule and the position in the data."""
    if progress.step or progress.optimizer_updates:
        set_updates_made(state.optimizer, progress.optimizer_updates, progress.updates_by_role)
    state.schedule.step(increment=progress.step - state.step)
    state.step, state.samples, state.tokens = progress.step, progress.samples, tokens
    state.blend = BlendState.from_json(progress.blend, domains=state.blend.domains)
    if state.balance is not None and progress.balance is not None:
        state.balance = {layer: progress.balance[str(layer)] for layer in state.balance}
    if state.unused_steps is not None and progress.unused_steps is not None:
        state.unused_steps = {
            layer: progress.unused_steps[str(layer)] for layer in state.unused_steps
        }


@torch.no_grad()
def restore_weights(
    model: Model,
    folder: Path,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    plan_hash: str,
) -> Progress:
    """Restore only the weights from ``folder``, saved under any layout, for inference.

    Raises:
        CheckpointError: The checkpoint has another model or precision, or is damaged.
    """
    progress = _checked_progress(folder, config, plan_hash)
    boxes: Boxes = {}
    for placement in placements(model, groups):
        flat = placement.parameter.detach().view(-1)
        boxes.setdefault(placement.key, []).extend(placement.boxes(flat, begin=0))
    clear(model)
    _read({key: held for key, held in boxes.items() if held}, folder)
    return progress


def _checked_progress(folder: Path, config: RunConfig, plan_hash: str) -> Progress:
    folders.check_small_files(folder)
    progress = folders.read_progress(folder)
    for name, saved, now in (
        ("expert plan (moe.* and upcycle.*)", progress.plan_hash, plan_hash),
        ("train.precision", progress.precision, config.train.precision),
    ):
        if saved != now:
            raise CheckpointError(
                f"{folder} was written with {name} ({saved}), but this job uses ({now}).\n"
                "  restore the setting, or choose another run.dir"
            )
    return progress


def _read(boxes: Boxes, folder: Path) -> None:
    group = new_group()
    try:
        read_boxes(boxes, folder, group)
    except CheckpointError as error:
        raise folders.with_way_out(error, folder) from error
    dist.destroy_process_group(group)


def clear(model: Model) -> None:
    """Set all weights to zero, because no checkpoint holds the rows that pad the vocabulary."""
    for module in model.modules:
        for parameter in module.parameters():
            parameter.zero_()


def _copy_to_master(kept: Owned) -> None:
    """Begin master weights, if there are any, with the weights: the checkpoint has none."""
    if (master := kept.tensors.get("master")) is not None:
        master.copy_(kept.parameter.detach().view(-1)[kept.begin : kept.begin + len(master)])


def all_boxes(state: TrainState, groups: ProcessGroupCollection) -> Boxes:
    """Return the boxes of all weights and of all optimizer state that this rank holds."""
    return _boxes(state, groups, owned(state.optimizer), writing=False)


def _boxes(
    state: TrainState,
    groups: ProcessGroupCollection,
    optimizer_state: Iterable[Owned],
    *,
    writing: bool,
) -> Boxes:
    """Return this rank's boxes of the model and of optimizer state.

    Args:
        state: Training state; the boxes are views of its memory.
        groups: This rank's process groups.
        optimizer_state: Optimizer state that the checkpoint holds.
        writing: Omit boxes that another tp or pp rank writes.
    """
    placed: dict[Tensor, list[Placement]] = {}
    boxes: Boxes = {}
    for placement in placements(state.model, groups):
        placed.setdefault(placement.parameter, []).append(placement)
    wanted = {p: [x for x in runs if x.writes or not writing] for p, runs in placed.items()}
    for parameter, runs in wanted.items():
        flat = parameter.detach().view(-1)
        for run in runs:
            boxes.setdefault(run.key, []).extend(run.boxes(flat, begin=0))
    for kept in optimizer_state:
        for name, flat in kept.tensors.items():
            for run in wanted[kept.parameter]:
                key = f"optimizer.{name}.{run.key}"
                boxes.setdefault(key, []).extend(run.boxes(flat, begin=kept.begin))
    return {key: held for key, held in boxes.items() if held}


_SMALL_BYTES = 2**20


def _only_small(tensor: Tensor) -> bool:
    """Select tensors to copy before a save returns, such as experts' biases, which change early."""
    return tensor.nbytes <= _SMALL_BYTES


def _copied_to_host(boxes: Boxes, which: Callable[[Tensor], bool]) -> Boxes:
    def copied(box: Box) -> Box:
        tensor = box.tensor.detach()
        return replace(box, tensor=copied_to_host(tensor)) if which(tensor) else box

    return {key: [copied(box) for box in held] for key, held in boxes.items()}
