"""What one rank is fed: its micro-batches of each step, and its part of the held-out text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batches import (
    Batch,
    micro_batches,
    slice_for_context_parallel,
    validation_batches,
)
from megatron_moe.data.blend import BlendState, next_global_batch
from megatron_moe.data.held_out import HeldOut, held_out_sizes
from megatron_moe.data.texts import Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a rank sits among those that share the data."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> Seat:
        """This rank's, by its process groups."""
        dp, cp = groups.dp, groups.cp
        return cls(dp_rank=dp.rank(), dp_size=dp.size(), cp_rank=cp.rank(), cp_size=cp.size())


class Feed:
    """The run's texts as one rank gets them.

    Args:
        texts: The run's.
        config: The run.
        seat: This rank's.
        pin: Put batches into pinned memory, from which a GPU copies without the host waiting.
    """

    def __init__(self, texts: Texts, config: RunConfig, seat: Seat, *, pin: bool = False) -> None:
        self.texts = texts
        self.seconds = 0.0
        """Time that the last `next_step` took: the step waited for it."""
        self._config = config
        self._seat = seat
        self._pin = pin

    def next_step(self, blend: BlendState) -> tuple[list[Batch], BlendState]:
        """This rank's micro-batches of the step that starts at ``blend``, and the place after."""
        start = time.perf_counter()
        train = self._config.train
        samples, after = next_global_batch(
            self.texts.training,
            blend,
            global_batch_size=train.global_batch_size,
            seed=self._config.run.seed,
        )
        batches = micro_batches(
            samples,
            position=blend.position,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=self._seat.dp_rank,
            dp_size=self._seat.dp_size,
        )
        mine = self._mine(batches)
        self.seconds = time.perf_counter() - start
        return mine, after

    def held_out(self, domain: str) -> list[Batch]:
        """This rank's micro-batches of the text that ``domain`` is judged on."""
        return self._mine(
            validation_batches(
                self.texts.validation[domain],
                num_samples=self._config.data.validation_samples,
                micro_batch_size=self._config.train.micro_batch_size,
                dp_rank=self._seat.dp_rank,
                dp_size=self._seat.dp_size,
            )
        )

    @cached_property
    def held_out_sizes(self) -> dict[str, HeldOut]:
        """How much text each domain is judged on, by all ranks; reads the tokenizer."""
        return held_out_sizes(
            self.texts.validation,
            num_samples=self._config.data.validation_samples,
            tokenizer_folder=self._config.dense.path,
        )

    def _mine(self, batches: list[Batch]) -> list[Batch]:
        seat = self._seat
        mine = [
            slice_for_context_parallel(batch, cp_rank=seat.cp_rank, cp_size=seat.cp_size)
            for batch in batches
        ]
        return [batch.map(Tensor.pin_memory) for batch in mine] if self._pin else mine
