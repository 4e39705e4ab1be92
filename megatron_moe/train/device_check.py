"""Compute a step twice, on different devices, and name those whose numbers are wrong.

Every replica of the model first computes the micro-batches of the next replica, and discards the
gradients; then it computes its own, as in any other step. So each rank's numbers exist twice, from
two devices that hold the same weights::

    replica           0        1        2            D0: text of replica 0
    first pass        D1       D2       D0           discarded
    step              D0       D1       D2           two numbers per text now
    if they differ    D2       D0       D1           a third one, and the odd one out is wrong

With one replica, the same devices repeat the step, which finds faults that come and go. With two,
a third pass by the same devices decides; it cannot if a device is always wrong, and both are named.
Master weights and moments of a distributed optimizer exist once, so nothing is compared with them.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from megatron_moe.data.batches import Batch
from megatron_moe.data.feed import Feed
from megatron_moe.errors import JobError
from megatron_moe.model.routers import routers_in
from megatron_moe.parallel.layout import ParallelLayout, Replicas
from megatron_moe.train.state import TrainState

Run = Callable[[list[Batch]], list[Tensor]]
"""Runs the schedule over micro-batches; see `step.run_schedule`."""

_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Relative differences between two devices of one kind that compute the same."""

    loss: float
    grad_norm: float


TOLERANCES = {"cpu": Tolerance(0.0, 0.0), "cuda": Tolerance(1e-6, 1e-3)}
"""On a CPU, the same program adds in the same order. On CUDA, backward passes of attention and of
the embedding add with atomics, in any order; these two bounds are not measured yet."""


@dataclass(frozen=True, slots=True)
class PassNumbers:
    """Numbers of one rank in one pass, before gradients are reduced over replicas."""

    weights: int
    """Sum of the bits of all weights as integers, which any flipped bit changes."""
    loss: float
    """Sum over this rank's tokens; 0 on all pipeline stages but the last."""
    grad_norm: float
    """Norm of this rank's own gradients."""

    def agrees(self, other: PassNumbers, tolerance: Tolerance) -> bool:
        """Return whether two ranks may have computed the same."""
        return _close(self.loss, other.loss, tolerance.loss) and _close(
            self.grad_norm, other.grad_norm, tolerance.grad_norm
        )


def _close(a: float, b: float, tolerance: float) -> bool:
    return math.isclose(a, b, rel_tol=tolerance) or (math.isnan(a) and math.isnan(b))


Passes = Sequence[Sequence[PassNumbers]]
"""Numbers by pass and by rank; pass ``k`` is that over the text of the replica ``k`` further."""


def suspects(passes: Passes, replicas: Replicas, tolerance: Tolerance) -> list[int]:
    """Return the ranks whose numbers differ from those of their counterparts, in order.

    A rank with other weights is the cause of other numbers elsewhere, so only such ranks are named
    if there are any. With two passes, both sides of a difference are returned; with three, those in
    the minority.
    """
    by_weights = _minority(passes, replicas, lambda a, b: a.weights == b.weights)
    return by_weights or _minority(passes, replicas, lambda a, b: a.agrees(b, tolerance))


def _minority(
    passes: Passes, replicas: Replicas, same: Callable[[PassNumbers, PassNumbers], bool]
) -> list[int]:
    wrong: set[int] = set()
    for owner in range(len(passes[0])):
        ranks = [replicas.counterpart(owner, -shift) for shift in range(len(passes))]
        results = [numbers[rank] for numbers, rank in zip(passes, ranks, strict=True)]
        agreeing = [sum(same(a, b) for b in results) for a in results]
        most = max(agreeing)
        if most < len(results):
            wrong |= {
                rank for rank, n in zip(ranks, agreeing, strict=True) if n < most or most == 1
            }
    return sorted(wrong)


class DeviceCheck:
    """Compute steps twice and compare.

    Args:
        feed: Source of any dp rank's micro-batches.
        layout: The job's layout.
        rank: This rank.
        device: ``cpu`` or ``cuda``.
        start: Steps taken before this job.
    """

    def __init__(
        self, feed: Feed, layout: ParallelLayout, *, rank: int, device: str, start: int
    ) -> None:
        self._feed, self._layout, self._rank = feed, layout, rank
        self._tolerance, self._passed = TOLERANCES[device], start

    def run(self, state: TrainState, run: Run, batches: list[Batch]) -> list[Tensor]:
        """Run the micro-batches of the next replica, then this rank's own, and compare.

        Leaves the same gradients and counts as ``run(batches)``.

        Args:
            state: State before the step, with gradient buffers at zero.
            run: Runs the schedule.
            batches: This rank's micro-batches.

        Returns:
            What ``run(batches)`` returns.

        Raises:
            JobError: Two devices computed different numbers; it names them.
        """
        other = self._discarded(state, run, shift=1)
        losses, own = _noting(state, run, batches, reduce=True)
        passes = _of_all_ranks(own, other)
        if suspects(passes, self._layout.replicas, self._tolerance):
            third = self._discarded(state, run, shift=2)
            self._fail(state.step + 1, [*passes, *_of_all_ranks(third)])
        self._passed = state.step + 1
        return losses

    def _discarded(self, state: TrainState, run: Run, *, shift: int) -> PassNumbers:
        """Run the micro-batches of another replica, and undo what the pass changed."""
        counterpart = self._layout.replicas.counterpart(self._rank, shift)
        dp_rank = self._layout.attention.coords(counterpart)["dp"]
        batches = self._feed.batches_of(state.blend, dp_rank=dp_rank)
        _zero_gradients(state)
        routers = list(routers_in(*state.model.modules))
        buffers = [(b, b.clone()) for router in routers for b in router.buffers()]
        _, numbers = _noting(state, run, batches, reduce=False)
        for buffer, before in buffers:
            buffer.copy_(before)
        for router in routers:
            router.take_counts()
        get_moe_metrics_tracker().clear()
        _zero_gradients(state)
        return numbers

    def _fail(self, step: int, passes: Passes) -> None:
        replicas = self._layout.replicas
        ranks = suspects(passes, replicas, self._tolerance)
        if not ranks:  # the third number lies between two that are just too far apart
            ranks = suspects(passes[:2], replicas, self._tolerance)
        hosts: list[Any] = [None] * len(passes[0])
        dist.all_gather_object(hosts, socket.gethostname())
        raise JobError(wrong_numbers(step, ranks, hosts, passes, replicas, passed=self._passed))


def wrong_numbers(
    step: int,
    ranks: Sequence[int],
    hosts: Sequence[str],
    passes: Passes,
    replicas: Replicas,
    *,
    passed: int,
) -> str:
    """Return the message that names the ranks whose numbers are wrong.

    Args:
        step: Step that was computed three times.
        ranks: Ranks to name.
        hosts: Host of each rank.
        passes: Numbers of the three passes.
        replicas: Replicas of the model.
        passed: Last step without a difference, or the step that the job started at.
    """
    named = " or ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)
    rank = ranks[0]
    results = [
        f"rank {other}: loss {n.loss:.9g}, gradient norm {n.grad_norm:.9g}, weights {n.weights:x}"
        for shift, numbers in enumerate(passes)
        for other in [replicas.counterpart(rank, -shift)]
        for n in [numbers[other]]
    ]
    return (
        f"{named} computed wrong numbers for step {step}, without an error: its device or memory "
        f"may be faulty. The text of rank {rank} gave, in turn,\n    "
        + "\n    ".join(results)
        + f"\nThe step was not applied. Weights since step {passed} may be affected.\n"
        "  leave that host out and resume; if a checkpoint was saved since step "
        f"{passed}, write the name of one before it into checkpoints/latest"
    )


def _of_all_ranks(*own: PassNumbers) -> list[list[PassNumbers]]:
    """Return the numbers of all ranks, by pass."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return [list(numbers) for numbers in zip(*by_rank, strict=True)]


def _noting(
    state: TrainState, run: Run, batches: list[Batch], *, reduce: bool
) -> tuple[list[Tensor], PassNumbers]:
    """Run a pass; return its losses, and its numbers before gradients are reduced."""
    noted = []
    reduce_gradients: Any = state.model.transformer.finalize_model_grads_func

    def finalize(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        noted.append((_weight_bits(state), _own_norm(state)))
        if reduce:
            for chunk in chunks:
                if chunk.ddp_config.overlap_grad_reduce:  # the backward pass would have done so
                    chunk.start_grad_sync()
            reduce_gradients(chunks, *args, **kwargs)

    with _reducing_at_the_end(state, finalize):
        losses = run(batches)
    loss = float(torch.stack(losses).double().sum(dim=0)[0]) if losses else 0.0
    ((weights, norm),) = noted
    return losses, PassNumbers(weights, loss, norm)


@contextmanager
def _reducing_at_the_end(state: TrainState, finalize: Callable[..., None]) -> Iterator[None]:
    """Reduce no gradients during backward passes; call ``finalize`` after the last one."""
    transformer: Any = state.model.transformer
    before = transformer.finalize_model_grads_func, transformer.no_sync_func
    transformer.finalize_model_grads_func, transformer.no_sync_func = finalize, None
    try:
        with ExitStack() as stack:
            for chunk in state.wrapped:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        transformer.finalize_model_grads_func, transformer.no_sync_func = before


def _zero_gradients(state: TrainState) -> None:
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()


def _weight_bits(state: TrainState) -> int:
    sums = [
        weight.detach().view(_DTYPES[weight.itemsize]).sum(dtype=torch.int64)
        for chunk in state.wrapped
        for weight in chunk.module.parameters()
    ]
    return int(torch.stack(sums).sum())


def _own_norm(state: TrainState) -> float:
    wrapped: list[Any] = list(state.wrapped)
    norms = [
        torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float64)
        for chunk in wrapped
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    ]
    return float(torch.stack(norms).norm())
