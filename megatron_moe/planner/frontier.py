"""Settings in the order of their predicted speed, without predicting all of them.

Layouts that share tp, cp, ep, etp and the micro-batch size spend the same time in each layer; pp
and vpp decide how much is lost around the layers. So a family's step takes at least what it would
take without pipeline, gradient reduction or recomputation, and a family is opened only when no
opened setting is faster than that: a best-first search that finds the exact order.
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
    """A layout with its batch and predicted time."""

    degrees: Degrees
    work: Workload
    time: StepTime


@dataclass(slots=True)
class Family:
    """Layouts that differ in pp (and, once opened, vpp) alone."""

    work: Workload
    degrees: list[Degrees]


class Frontier:
    """A queue of families and settings by their least possible step time."""

    def __init__(self, shape: MoeShape, machine: Machine, families: list[Family]) -> None:
        self._shape, self._machine = shape, machine
        self._order = count()  # a tie-breaker, so that what is queued is never compared
        self._queue: list[tuple[float, int, Family | Setting]] = []
        for family in families:
            seconds = least_seconds(shape, family.work, family.degrees[0], machine)
            heapq.heappush(self._queue, (seconds, next(self._order), family))

    def __iter__(self) -> Iterator[Setting]:
        """Settings from the fastest on; those `slower` adds meanwhile come in their turn."""
        while self._queue:
            _, _, item = heapq.heappop(self._queue)
            if isinstance(item, Setting):
                yield item
                continue
            for degrees in item.degrees:
                batches = item.work.micro_batches(degrees)
                for vpp in chunkings(self._shape, degrees, micro_batches=batches):
                    self._add(replace(degrees, vpp=vpp), item.work)

    def slower(self, setting: Setting) -> bool:
        """Queue the setting with the next recomputation; False: everything is recomputed."""
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
