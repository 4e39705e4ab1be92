"""Best-first search: yield settings in order of predicted speed without predicting all of them.

Layouts that share tp, cp, ep, etp and the micro-batch size form a family: they spend the same time
in each layer, and pp and vpp determine the time lost around the layers. The step time without
pipeline, gradient reduction or recomputation is therefore a lower bound for the family. A family is
expanded only when its bound is lower than the time of every setting in the queue, so the order is
exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from megatron_moe.planner.candidates import chunkings
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.time import StepTime, least_seconds, step_time
from megatron_moe.planner.workload import Degrees, Workload


@dataclass(frozen=True, slots=True)
class Setting:
    """A layout with its batch and predicted step time."""

    degrees: Degrees
    work: Workload
    time: StepTime


@dataclass(slots=True)
class Family:
    """Layouts that differ only in pp and, once expanded, vpp."""

    work: Workload
    degrees: list[Degrees]


class Frontier:
    """A priority queue of families and settings, ordered by the lower bound of their step time."""

    def __init__(self, shape: MoeShape, machine: Machine, families: list[Family]) -> None:
        self._shape, self._machine = shape, machine
        self._order = count()  # a tie-breaker, so that queued items are never compared
        self._queue: list[tuple[float, int, Family | Setting]] = []
        for family in families:
            seconds = least_seconds(shape, family.work, family.degrees[0], machine)
            heapq.heappush(self._queue, (seconds, next(self._order), family))

    def __iter__(self) -> Iterator[Setting]:
        """Yield settings from the fastest on, including those added meanwhile."""
        while self._queue:
            _, _, item = heapq.heappop(self._queue)
            if isinstance(item, Setting):
                yield item
                continue
            for degrees in item.degrees:
                batches = item.work.micro_batches(degrees)
                for vpp in chunkings(self._shape, degrees, micro_batches=batches):
                    self._add(replace(degrees, vpp=vpp), item.work)

    def add_with_more_recompute(self, setting: Setting) -> bool:
        """Queue the setting with the next recomputation level; return False if there is none."""
        settings = setting.work.recompute_settings
        following = settings.index(setting.work.recompute) + 1
        if following == len(settings):
            return False
        work = replace(setting.work, recompute=settings[following])
        self._add(setting.degrees, work)
        return True

    def _add(self, degrees: Degrees, work: Workload) -> None:
        time = step_time(self._shape, work, degrees, self._machine)
        item = Setting(degrees, work, time)
        heapq.heappush(self._queue, (time.step_seconds, next(self._order), item))
