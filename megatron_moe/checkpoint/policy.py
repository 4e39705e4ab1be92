"""When a save fails, and when a loss spikes: what becomes of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.checkpoint.folder import newest, read_progress
from megatron_moe.checkpoint.sharded import Saver, restore
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.train.state import TrainState
from megatron_moe.train.step import StepResult

RETRY_SECONDS = 10
"""Between two tries of the last save."""

Say = Callable[[str], None]


def save_or_go_on(
    saver: Saver,
    state: TrainState,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    last: bool,
    say: Say,
) -> None:
    """Save; a disk that refuses costs this checkpoint only, unless it is the last of this process.

    Raises:
        CheckpointError: The last save was refused until ``guard.save_retry_seconds`` were over.
    """
    tries = 1 + int(config.guard.save_retry_seconds / RETRY_SECONDS) if last else 1
    _done(saver.wait, say)  # what went wrong with the save before, beside training
    for left in reversed(range(tries)):
        written = _done(partial(saver.save, state, groups), say)
        if written and (not last or _done(saver.wait, say)):
            return
        if left:
            say(f"  trying again every {RETRY_SECONDS} s, for {left * RETRY_SECONDS} s")
            time.sleep(RETRY_SECONDS)
    if last:
        raise CheckpointError(
            f"step {state.step} could not be saved, for the reasons above.\n"
            f"  make room for {config.run.dir} and run the same command again: it goes on from the "
            "newest checkpoint"
        )
    say(f"  training goes on; the next save is due in {config.checkpoint.interval} steps")


def go_back(
    saver: Saver,
    state: TrainState,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    plan_hash: str,
) -> bool:
    """Return to the newest checkpoint but not to its place in the data; False where there is none.

    The place is saved at once, under the step that the run is back at: a resume must leave the
    batches out too.
    """
    saver.wait()
    folder = newest(config.run.dir)
    if folder is None or read_progress(folder).step == 0:
        return False
    samples, blend = state.samples, state.blend
    restore(state, folder, config, groups, plan_hash=plan_hash)
    state.samples, state.blend = samples, blend
    saver.save(state, groups)
    return True


def told(step: int, result: StepResult, *, back_at: int | None) -> str:
    """What the operator reads of a step that changed no weights."""
    seen = f"loss {result.lm_loss:.4f}, gradient norm {result.grad_norm:.4f}"
    if back_at is None:
        return f"step {step} changed no weights: {seen}"
    return f"step {step} spiked ({seen}): back at step {back_at}, the batches since are left out"


def _done(attempt: Callable[[], None], say: Say) -> bool:
    """Whether all ranks could do it; what a rank ran into is told."""
    try:
        attempt()
    except CheckpointError as error:
        say(str(error))
        return False
    return True
