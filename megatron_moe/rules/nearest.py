"""The legal layout closest to one that is not: a pure search over degrees of the same world."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_moe.config.run import Parallel

Degrees = tuple[int, int, int, int, int, int]
"""tp, cp, pp, vpp, ep, etp."""

SETTINGS = (
    "tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size",
    "virtual_pipeline_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip


def nearest_layout(
    parallel: Parallel, *, world_size: int, num_layers: int, is_legal: Callable[[Parallel], bool]
) -> Parallel | None:
    """The legal degrees that differ least from ``parallel``; None where no degrees are legal.

    Degrees are compared by ratio: from 4 to 2 is as far as from 1 to 2. Of two at one distance the
    smaller degrees win: less communication.
    """
    wanted = _degrees(parallel)
    for degrees in sorted(_layouts(world_size, num_layers), key=lambda d: (_far(d, wanted), d)):
        found = _parallel(parallel, degrees)
        if is_legal(found):
            return found
    return None


def changes(before: Parallel, after: Parallel) -> str:
    """The settings to change, as the command line takes them."""
    return " ".join(
        f"parallel.{name}={getattr(after, name) or 1}"
        for name in SETTINGS
        if (getattr(before, name) or 1) != (getattr(after, name) or 1)
    )


def _layouts(world_size: int, num_layers: int) -> Iterator[Degrees]:
    """Degrees that divide the world twice, and the layers."""
    for pp in _divisors(math.gcd(world_size, num_layers)):
        stage = world_size // pp
        chunks = _divisors(num_layers // pp) if pp > 1 else [1]
        pairs = [(a, b) for a in _divisors(stage) for b in _divisors(stage // a)]
        for (tp, cp), (ep, etp), vpp in itertools.product(pairs, pairs, chunks):
            yield tp, cp, pp, vpp, ep, etp


def _far(degrees: Degrees, wanted: Degrees) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(degrees, wanted, strict=True))


def _degrees(parallel: Parallel) -> Degrees:
    tp, cp, pp, vpp, ep, etp = (getattr(parallel, name) or 1 for name in SETTINGS)
    return tp, cp, pp, vpp, ep, etp


def _parallel(parallel: Parallel, degrees: Degrees) -> Parallel:
    update: dict[str, Any] = dict(zip(SETTINGS, degrees, strict=True))
    if degrees[3] == 1:
        update["virtual_pipeline_parallel_size"] = parallel.virtual_pipeline_parallel_size and 1
    return parallel.model_copy(update=update)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
