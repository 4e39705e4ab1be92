"""Time the phases of a step, by ranges around the calls that make it up.

A range is one of `PHASES`. The device is waited for where one begins and ends, so what usually runs
side by side is taken apart and the step is slower than one that is timed whole: these are shares,
not speeds. Time counts for the innermost range, and all of them together are the step:

    data        the next micro-batches          experts    their products
    forward     all but the three beside it     combine    back to where they came from, summed
    dispatch    tokens to their experts         backward   all of it, its communication included
    reduce      gradients over dp: what the backward pass has not hidden
    optimizer   norm, clipping, update, gathering of weights
    other       zeroing, the loss, counting; with pp, waiting for other stages

What the backward pass computes again counts where it is computed: dispatch, experts, combine.
Every range is a `record_function` too, so that a profiler's trace shows them.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.profiler import record_function

from megatron_moe.bench.record import PHASES
from megatron_moe.train.state import TrainState

DISPATCHER = {
    "dispatch": ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"),
    "combine": ("combine_preprocess", "token_combine", "combine_postprocess"),
}
OPTIMIZER = ("prepare_grads", "get_grad_norm", "step_with_ready_grads")


class Stopwatch:
    """Seconds by phase since `start`, innermost range first.

    Args:
        wait: Returns when the device has done what it was told.
    """

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait
        self._ranges = ["other"]
        self.start()

    def start(self) -> None:
        """Forget what was measured."""
        self._wait()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def range(self, phase: str) -> Iterator[None]:
        """Count the time inside for ``phase``."""
        self._book()
        self._ranges.append(phase)
        try:
            with record_function(f"bench/{phase}"):
                yield
                self._book()
        finally:
            self._ranges.pop()

    def read(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        self._book()
        return dict(self._seconds)

    def _book(self) -> None:
        # Autograd runs backward in a thread of its own on CUDA, while the one that called it waits:
        # there is one innermost range at any time.
        self._wait()
        now = time.perf_counter()
        self._seconds[self._ranges[-1]] += now - self._last
        self._last = now


@contextlib.contextmanager
def watched(state: TrainState, stopwatch: Stopwatch) -> Iterator[None]:
    """Put ranges around Megatron-Core's calls for the length of a ``with`` block."""
    with contextlib.ExitStack() as stack:

        def watch(phase: str, owner: Any, *names: str) -> None:
            for name in names:
                stack.enter_context(_in_range(owner, name, stopwatch, phase))

        watch("backward", schedules, "backward_step")
        watch("reduce", state.model.transformer, "finalize_model_grads_func")
        watch("optimizer", state.optimizer, *OPTIMIZER)
        for chunk in state.wrapped:
            watch("forward", chunk, "forward")
        for module in state.model.modules:
            for layer in module.modules():
                if isinstance(layer, MoELayer):
                    watch("experts", layer.experts, "forward")
                    for phase, names in DISPATCHER.items():
                        watch(phase, layer.token_dispatcher, *names)
        yield


@contextlib.contextmanager
def _in_range(owner: Any, name: str, stopwatch: Stopwatch, phase: str) -> Iterator[None]:
    """``owner.name`` inside a range; afterwards ``owner`` is as it was."""
    original, was_own = getattr(owner, name), name in vars(owner)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.range(phase):
            return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
