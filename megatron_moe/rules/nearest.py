"""Search for the nearest legal layout with the same number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_moe.config.run import Parallel

Degrees = tuple[int, int, int, int, int, int]
"""Degrees in the order tp, cp, pp, vpp, ep, etp."""

SETTINGS = (
    "tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size",
    "virtual_pipeline_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip
SPLITS = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)  # fmt: skip


def nearest_layout(
    parallel: Parallel, *, world_size: int, num_layers: int, is_legal: Callable[[Parallel], bool]
) -> Parallel | None:
    """Return the legal layout nearest to ``parallel``, or None if no layout is legal.

    Degrees are compared by ratio: 4 to 2 is the same distance as 1 to 2. Ties go to the smaller
    degrees, which need less communication.
    """
    current = _degrees(parallel)
    candidates = _layouts(world_size, num_layers)
    for degrees in sorted(candidates, key=lambda d: (_distance(d, current), d)):
        candidate = _parallel(parallel, degrees)
        if is_legal(candidate):
            return candidate
    return None


def changes(before: Parallel, after: Parallel) -> str:
    """Return the settings to change, in command-line form."""
    degrees = (
        f"parallel.{name}={getattr(after, name) or 1}"
        for name in SETTINGS
        if (getattr(before, name) or 1) != (getattr(after, name) or 1)
    )
    dropped = (f"parallel.{name}=null" for name in SPLITS if getattr(before, name) is not None)
    return " ".join([*degrees, *dropped])


def _layouts(world_size: int, num_layers: int) -> Iterator[Degrees]:
    """Yield degrees that divide the world size in both grids, and the layers."""
    for pp in _divisors(math.gcd(world_size, num_layers)):
        stage = world_size // pp
        chunks = _divisors(num_layers // pp) if pp > 1 else [1]
        pairs = [(a, b) for a in _divisors(stage) for b in _divisors(stage // a)]
        for (tp, cp), (ep, etp), vpp in itertools.product(pairs, pairs, chunks):
            yield tp, cp, pp, vpp, ep, etp


def _distance(degrees: Degrees, other: Degrees) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(degrees, other, strict=True))


def _degrees(parallel: Parallel) -> Degrees:
    tp, cp, pp, vpp, ep, etp = (getattr(parallel, name) or 1 for name in SETTINGS)
    return tp, cp, pp, vpp, ep, etp


def _parallel(parallel: Parallel, degrees: Degrees) -> Parallel:
    update: dict[str, Any] = {**dict(zip(SETTINGS, degrees, strict=True)), **dict.fromkeys(SPLITS)}
    if degrees[3] == 1:
        update["virtual_pipeline_parallel_size"] = parallel.virtual_pipeline_parallel_size and 1
    return parallel.model_copy(update=update)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
