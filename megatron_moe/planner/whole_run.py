"""Predict a whole run from the time of one step: days, cost, disk, and time lost to failures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.epochs import Epochs, epochs_of
from megatron_moe.planner.parameters import rank_parameters, total_parameters
from megatron_moe.planner.search import Candidate
from megatron_moe.planner.shape import MoeShape, run_shape
from megatron_moe.planner.workload import Degrees, Workload

GPU_HOURS_PER_FAILURE = 50_000
"""GPU-hours between unexpected interruptions: 419 in 54 days on 16,384 H100 (Llama 3, arXiv
2407.21783, section 3.3.4). The default where the user states no mean time between failures."""

RESTART_SECONDS = 600
"""Assumed time from a failure to the first new step: detection, queue, imports, loading."""

NODE_BYTES_PER_SECOND = 2e9
"""Assumed rate at which a node writes to shared storage; the user's own is ``--storage``."""

MAX_EXPONENT = 100.0
"""Bound on the exponents of Daly's model; beyond it, a run practically never ends."""

SOURCE_BYTES = 2
"""Bytes of one weight of the dense checkpoint, which is usually bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Facts about a cluster that no configuration states."""

    mtbf_hours: float | None = None
    """Mean time between failures of the whole job. None: `GPU_HOURS_PER_FAILURE` over the GPUs."""
    storage_bytes_per_second: float | None = None
    """Rate at which all ranks together write a checkpoint. None: `NODE_BYTES_PER_SECOND` a node."""
    price: float | None = None
    """Price of one GPU-hour, in any currency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """Prediction for all steps of a run."""

    steps: int
    tokens: int
    hours: float
    """Wall time of all steps, of saving, and of repeating what failures destroy."""
    step_hours: float
    """Part of `hours` in which steps are taken once."""
    saving_hours: float
    failures: float
    """Expected number of failures."""
    failure_hours: float
    """Expected time lost to failures: restarts, and steps taken again."""
    gpu_hours: float
    cost: float | None
    """GPU-hours times the price; None without a price."""
    mtbf_hours: float
    interval: int
    """Steps between checkpoints in the configuration."""
    best_interval: int
    """Steps between checkpoints that lose the least time (Daly)."""
    best_hours: float
    """`hours` at `best_interval`."""
    num_checkpoints: int
    """Checkpoints written during the run."""
    checkpoint_bytes: int
    disk_bytes: int
    """Checkpoints that are kept, and the one being written."""
    save_seconds: float
    """Time that training waits for one checkpoint; 0 with ``checkpoint.async_save``."""
    source_bytes_read: int
    """Bytes of the dense checkpoint that all ranks read, with method copy."""
    text_bytes_read: int
    """Bytes of tokens read, at 4 bytes a token."""
    epochs: tuple[Epochs, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return asdict(self)


def whole_run(
    config: RunConfig,
    spec: ModelSpec,
    candidate: Candidate,
    circumstances: Circumstances,
    *,
    gpus_per_node: int = 8,
) -> WholeRun:
    """Predict a run of ``train.steps`` steps with the layout of ``candidate``."""
    shape = run_shape(config, spec)
    degrees, work, time = candidate.degrees, candidate.work, candidate.time
    steps = config.train.steps
    size = checkpoint_bytes(shape, work)
    nodes = -(-degrees.gpus // gpus_per_node)
    rate = circumstances.storage_bytes_per_second or NODE_BYTES_PER_SECOND * nodes
    save = 0.0 if config.checkpoint.async_save else size / rate
    mtbf = circumstances.mtbf_hours or GPU_HOURS_PER_FAILURE / degrees.gpus
    # With async_save, saving costs next to nothing, but a save cannot begin before the last ends.
    best = _best_interval(max(save, 1.0), mtbf * 3600, time.step_seconds, size / rate)
    lost = _lost_hours(config.checkpoint.interval, steps, time.step_seconds, save, mtbf)
    best_lost = _lost_hours(best, steps, time.step_seconds, save, mtbf)
    step_hours = steps * time.step_seconds / 3600
    hours = step_hours + lost[0] + lost[1]
    kept = min(config.checkpoint.keep + 1, _saves(steps, config.checkpoint.interval))
    tokens = steps * work.global_batch_size * work.sequence_length
    return WholeRun(
        steps=steps,
        tokens=tokens,
        hours=hours,
        step_hours=step_hours,
        saving_hours=lost[0],
        failures=hours / mtbf,
        failure_hours=lost[1],
        gpu_hours=hours * degrees.gpus,
        cost=None if circumstances.price is None else hours * degrees.gpus * circumstances.price,
        mtbf_hours=mtbf,
        interval=config.checkpoint.interval,
        best_interval=best,
        best_hours=step_hours + sum(best_lost),
        num_checkpoints=_saves(steps, config.checkpoint.interval),
        checkpoint_bytes=size,
        disk_bytes=kept * size,
        save_seconds=save,
        source_bytes_read=source_bytes_read(shape, degrees),
        text_bytes_read=4 * tokens,
        epochs=epochs_of(config.data, tokens),
    )


def checkpoint_bytes(shape: MoeShape, work: Workload) -> int:
    """Return the bytes of one checkpoint: weights, and the optimizer state of those trained.

    The state is two moments and, for bf16, master weights.
    """
    state = work.state.moments + work.state.host + (4 if work.precision == "bf16" else 0)
    trained = total_parameters(shape, frozen=work.frozen)
    return total_parameters(shape) * work.bytes_per_value + trained * state


def source_bytes_read(shape: MoeShape, degrees: Degrees) -> int:
    """Return the bytes that all ranks together read of the dense checkpoint, with method copy.

    A rank reads its shards of the dense weights, and once the shard of the FFN that all of its
    experts of a layer are copies of.
    """
    total, shape = 0, replace(shape, lora_rank=0)
    local_experts = max(1, shape.num_moe_experts // degrees.ep)
    for pp_rank in range(degrees.pp):
        dense, experts = rank_parameters(shape, degrees, pp_rank=pp_rank)
        total += (dense + experts // local_experts) * degrees.gpus // degrees.pp
    return SOURCE_BYTES * total


def daly_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return the seconds of work between checkpoints that lose the least time.

    It is Daly's higher-order estimate (Future Generation Computer Systems 22, 2006), which extends
    Young's ``sqrt(2 * save * mtbf)``.
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = math.sqrt(save_seconds / (2 * mtbf_seconds))
    young = math.sqrt(2 * save_seconds * mtbf_seconds)
    return young * (1 + ratio / 3 + ratio**2 / 9) - save_seconds


def expected_seconds(
    work_seconds: float, interval: float, save: float, mtbf: float, restart: float
) -> float:
    """Return the expected wall time of ``work_seconds`` of steps, in Daly's complete model.

    Failures are a Poisson process; one during a restart or a save starts it again.
    """
    rounds, unlikely = work_seconds / interval, min(MAX_EXPONENT, (interval + save) / mtbf)
    restarts = math.exp(min(MAX_EXPONENT, restart / mtbf))
    return mtbf * restarts * math.expm1(unlikely) * rounds


def _best_interval(save: float, mtbf: float, step_seconds: float, write_seconds: float) -> int:
    """Return Daly's interval in steps; never shorter than a checkpoint takes to write."""
    seconds = max(daly_interval(save, mtbf), write_seconds)
    return max(1, round(seconds / step_seconds))


def _lost_hours(
    interval: int, steps: int, step_seconds: float, save: float, mtbf_hours: float
) -> tuple[float, float]:
    """Return the hours spent on saving, and the expected hours lost to failures."""
    work, between = steps * step_seconds, min(interval, max(steps, 1)) * step_seconds
    saving = _saves(steps, interval) * save
    if not work:
        return saving / 3600, 0.0
    total = expected_seconds(work, between, save, mtbf_hours * 3600, RESTART_SECONDS)
    return saving / 3600, max(0.0, total - work - saving) / 3600


def _saves(steps: int, interval: int) -> int:
    """Return the number of checkpoints; the last step is always saved."""
    return max(1, -(-steps // interval))
