"""Check 9: where the time of a training step goes, and which lines wait for the GPU.

A kernel counts for the part of the model whose forward or backward pass launched it: autograd gives
the gradient of an operation the operation's sequence number. The step times that a run logs are
compared with those of the device.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_checks.inputs import shape_config
from gpu_checks.session import Session
from gpu_checks.timing import synchronize
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.wait import waiter
from megatron_moe.runtime.world import World

PARTS = ("experts", "routing", "attention", "loss", "optimizer", "rest")
"""routing: MoE layers but for their experts. loss: with the output layer."""
PREFIX = "part/"
TIMED_STEPS = 3
LOGGED_TIME_ERROR = 0.02
"""Largest part of the device's time that logged step times may leave out or count twice."""
TOP_KERNELS = 12


def profile_step(session: Session) -> None:
    """Profile a step of half of Llama-3.2-1B's layers with four experts, balanced."""
    config = shape_config(
        session, "profile", shape={"layers": session.size(8, 2)},
        train={"global_batch_size": session.size(4, 2)},
    )  # fmt: skip
    session.on_rank(partial(_profile, session, config))


def _profile(session: Session, config: RunConfig, world: World) -> None:
    from megatron_moe.bench.steps import Bench, BenchOptions

    bench = Bench(config, world, BenchOptions(random=True, routing="balanced"))
    for _ in range(2):
        bench.timed_step()
    _logged_time(session, bench, world.device)
    _host_syncs(session, bench)
    _parts(session, bench, world.device)


def _logged_time(session: Session, bench: Any, device: torch.device) -> None:
    """Compare the step times of the package's loop with the time that the device needed."""
    from megatron_moe.train.loop import run_loop

    logged: list[float] = []
    state = bench.state

    def describe(_: object, seconds: float) -> dict[str, float]:
        logged.append(seconds)
        return {}

    synchronize(device)
    start = time.perf_counter()
    run_loop(
        state, steps=state.step + TIMED_STEPS, take_step=bench.step, wait=waiter(device),
        describe=describe, hooks=(), keeps=lambda _: True, stopping=lambda: False,
    )  # fmt: skip
    synchronize(device)
    seconds = time.perf_counter() - start
    error = abs(sum(logged) / seconds - 1)
    session.add(
        "logged step times", f"{error:.1%} from the device's {seconds / TIMED_STEPS:.3f} s a step",
        expected=f"within {LOGGED_TIME_ERROR:.0%}",
        verdict=session.target(error <= LOGGED_TIME_ERROR),
        logged_seconds=logged, synchronized_seconds=seconds,
    )  # fmt: skip


def _host_syncs(session: Session, bench: Any) -> None:
    """Count how often a step makes the host wait for the GPU, by line."""
    if session.device == "cpu":
        session.skip("host syncs", "torch reports them on CUDA only")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            bench.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{warning.filename.rpartition('site-packages/')[2]}:{warning.lineno}"
        for warning in caught if "synchroniz" in str(warning.message)
    )  # fmt: skip
    most = ", ".join(f"{line} ({count})" for line, count in lines.most_common(2))
    session.add("host syncs a step", f"{lines.total()}: {most}", by_line=dict(lines.most_common()))


def _parts(session: Session, bench: Any, device: torch.device) -> None:
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _ranges(bench.state), profile(activities=activities) as profiler:
        bench.step()
        synchronize(device)
    seconds = seconds_by_part(list(profiler.events() or ()), cuda=cuda)
    total = sum(seconds.values())
    for part in PARTS:
        session.add(f"time in {part}", f"{seconds[part] / total:.1%} of {total * 1e3:.0f} ms",
                    seconds=seconds[part])  # fmt: skip
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    table = [
        {"name": event.key, "calls": event.count, "milliseconds": getattr(event, key) / 1e3}
        for event in averages[:TOP_KERNELS]
    ]
    session.add("longest kernel", table[0]["name"][:40], kernels=table)


@contextmanager
def _ranges(state: Any) -> Iterator[None]:
    """Record what the parts of the model do under their names, for the length of a block."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    with ExitStack() as stack:
        for module in state.model.modules:
            for layer in module.decoder.layers:
                if isinstance(layer.mlp, MoELayer):
                    stack.enter_context(_recorded(layer.mlp, "forward", "routing"))
                    stack.enter_context(_recorded(layer.mlp.experts, "forward", "experts"))
                attention = layer.self_attention.core_attention
                stack.enter_context(_recorded(attention, "forward", "attention"))
            stack.enter_context(_recorded(module, "_postprocess", "loss"))
        for name in ("prepare_grads", "get_grad_norm", "step_with_ready_grads"):
            stack.enter_context(_recorded(state.optimizer, name, "optimizer"))
        yield


@contextmanager
def _recorded(owner: Any, name: str, part: str) -> Iterator[None]:
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def seconds_by_part(events: list[Any], *, cuda: bool) -> dict[str, float]:
    """Return the seconds of kernels (on a CPU: of operations) by part of the model.

    Args:
        events: ``FunctionEvent`` of a profile.
        cuda: Count kernels; otherwise operations.
    """
    # An operation without a gradient carries the number of the next that has one: the last counts.
    in_order = sorted(events, key=lambda event: event.time_range.start)
    forward = [event for event in in_order if event.sequence_nr >= 0 and not _is_backward(event)]
    part_of_forward = {event.sequence_nr: _range_of(event) for event in forward}
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        spent = (
            sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        )
        if spent:
            part = _range_of(event) or part_of_forward.get(_backward_of(event)) or "rest"
            seconds[part] += spent / 1e6
    return {part: seconds[part] for part in PARTS}


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _range_of(event: Any) -> str | None:
    """Return the innermost part whose range the event lies in."""
    return next(
        (e.name.removeprefix(PREFIX) for e in _ancestors(event) if e.name.startswith(PREFIX)), None
    )


def _is_backward(event: Any) -> bool:
    return any(e.name.startswith("autograd::engine") for e in _ancestors(event))


def _backward_of(event: Any) -> int:
    """Return the sequence number of the operation whose gradient the event computes, or -1."""
    return next(
        (e.sequence_nr for e in _ancestors(event)
         if e.sequence_nr >= 0 and e.name.startswith("autograd::engine")), -1,
    )  # fmt: skip
