"""Provide one rank's micro-batches of each step, and its part of the held-out text."""

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
class DataRank:
    """Rank and size of this process in the groups that divide the data."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> DataRank:
        """Read ranks and sizes from the process groups of this rank."""
        dp, cp = groups.dp, groups.cp
        return cls(dp_rank=dp.rank(), dp_size=dp.size(), cp_rank=cp.rank(), cp_size=cp.size())


class Feed:
    """Batches of one rank, from the texts of a run.

    Args:
        texts: Texts of the run.
        config: Configuration of the run.
        rank: Data rank of this process.
        pin: Put batches into pinned memory, so that copies to the GPU do not block the host.
    """

    def __init__(
        self, texts: Texts, config: RunConfig, rank: DataRank, *, pin: bool = False
    ) -> None:
        self.texts = texts
        self.seconds = 0.0
        """Duration of the last `next_step`, for which the training step waited."""
        self._config = config
        self._rank = rank
        self._pin = pin

    def next_step(self, blend: BlendState) -> tuple[list[Batch], BlendState]:
        """Return this rank's micro-batches of the step at ``blend``, and the state after it."""
        start = time.perf_counter()
        result = self._step(blend, self._rank.dp_rank)
        self.seconds = time.perf_counter() - start
        return result

    def batches_of(self, blend: BlendState, *, dp_rank: int) -> list[Batch]:
        """Return the micro-batches of another dp rank in the step at ``blend``."""
        return self._step(blend, dp_rank)[0]

    def _step(self, blend: BlendState, dp_rank: int) -> tuple[list[Batch], BlendState]:
        train = self._config.train
        size = train.batch_size_after(blend.position)
        samples, after = next_global_batch(
            self.texts.training,
            blend,
            global_batch_size=size,
            seed=self._config.run.seed,
        )
        batches = micro_batches(
            samples,
            position=blend.position,
            global_batch_size=size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=self._rank.dp_size,
        )
        return self._slice_and_pin(batches), after

    def held_out(self, domain: str) -> list[Batch]:
        """Return this rank's micro-batches of the held-out text of ``domain``."""
        return self._slice_and_pin(
            validation_batches(
                self.texts.validation[domain],
                num_samples=self._config.data.validation_samples,
                micro_batch_size=self._config.train.micro_batch_size,
                dp_rank=self._rank.dp_rank,
                dp_size=self._rank.dp_size,
            )
        )

    @cached_property
    def held_out_sizes(self) -> dict[str, HeldOut]:
        """Size of each domain's held-out text over all ranks; reads the tokenizer."""
        return held_out_sizes(
            self.texts.validation,
            num_samples=self._config.data.validation_samples,
            tokenizer_folder=self._config.source.path,
        )

    def _slice_and_pin(self, batches: list[Batch]) -> list[Batch]:
        rank = self._rank
        slices = [
            slice_for_context_parallel(batch, cp_rank=rank.cp_rank, cp_size=rank.cp_size)
            for batch in batches
        ]
        return [batch.map(Tensor.pin_memory) for batch in slices] if self._pin else slices
