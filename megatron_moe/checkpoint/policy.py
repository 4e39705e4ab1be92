"""Decide how a run continues after a failed save or a loss spike."""

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
"""Seconds between two attempts of the last save."""

Say = Callable[[str], None]


def save_or_continue(
    saver: Saver,
    state: TrainState,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    last: bool,
    say: Say,
) -> None:
    """Save a checkpoint; if that fails, continue without it, unless it is this process's last.

    Raises:
        CheckpointError: The last save kept failing for ``guard.save_retry_seconds``.
    """
    tries = 1 + int(config.guard.save_retry_seconds / RETRY_SECONDS) if last else 1
    _succeeds(saver.wait, say)  # log an error of the previous background save
    for left in reversed(range(tries)):
        written = _succeeds(partial(saver.save, state, groups), say)
        if written and (not last or _succeeds(saver.wait, say)):
            return
        if left:
            say(f"  Retrying every {RETRY_SECONDS} s for {left * RETRY_SECONDS} s.")
            time.sleep(RETRY_SECONDS)
    if last:
        raise CheckpointError(
            f"step {state.step} could not be saved; the reasons are logged above.\n"
            f"  free disk space for {config.run.dir} and run the same command to resume from the "
            "newest checkpoint"
        )
    say(f"  Training continues. The next save is due in {config.checkpoint.interval} steps.")


def roll_back(
    saver: Saver,
    state: TrainState,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    plan_hash: str,
) -> bool:
    """Restore the newest checkpoint, but keep the position in the data.

    The restored step is saved again at once with the current position in the data, so that a resume
    skips the same batches.

    Returns:
        False if there is no checkpoint to restore.
    """
    saver.wait()
    folder = newest(config.run.dir)
    if folder is None or read_progress(folder).step == 0:
        return False
    samples, tokens, blend = state.samples, state.tokens, state.blend
    restore(state, folder, config, groups, plan_hash=plan_hash)
    state.samples, state.tokens, state.blend = samples, tokens, blend
    saver.save(state, groups)
    return True


def step_message(step: int, result: StepResult, *, back_at: int | None) -> str:
    """Return the log message for a step that changed no weights."""
    numbers = f"loss {result.lm_loss:.4f}, gradient norm {result.grad_norm:.4f}"
    if back_at is None:
        return f"Skipped the update of step {step}: {numbers}."
    return (
        f"The loss spiked at step {step} ({numbers}). Restored step {back_at}; the batches "
        "since then are skipped."
    )


def _succeeds(attempt: Callable[[], None], say: Say) -> bool:
    """Run ``attempt``; return whether it succeeded on all ranks, and log the error if not."""
    try:
        attempt()
    except CheckpointError as error:
        say(str(error))
        return False
    return True
