"""Build the micro-batches of each data-parallel rank, and slice sequences over cp ranks.

Sample ``k`` of a run is a function of (data, seed, k) alone. The layout, the number of ranks and
the batch sizes decide which rank computes a sample, never which samples a step contains. A run can
therefore change its layout between steps; its position in the data is one number, the samples
consumed so far.

Shape letters of this module:

    B  micro_batch_size
    S  seq_length (S / cp after slicing for context parallelism)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_moe.data.samples import Chunked, Sample, SampleSource
from megatron_moe.errors import ConfigError
from megatron_moe.parallel.sequence import zigzag


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of the model for one micro-batch."""

    tokens_BS: Tensor
    """Input ids, int64."""

    labels_BS: Tensor
    """The token that follows each input, int64."""

    loss_mask_BS: Tensor
    """1.0 where the loss counts, float32."""

    position_ids_BS: Tensor
    """Position of each token in its full sequence, also after slicing, int64."""

    samples_B: Tensor
    """Index of each sample in the run, or in the validation text, int64."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch with ``change`` applied to every ``BS`` tensor, e.g. a copy to the GPU."""
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            labels_BS=change(self.labels_BS),
            loss_mask_BS=change(self.loss_mask_BS),
            position_ids_BS=change(self.position_ids_BS),
        )


def make_batch(samples: Sequence[Sample], *, first: int = 0) -> Batch:
    """Stack ``B`` samples of equal length into model inputs; ``first`` is the first one's index."""
    ids_BT = torch.from_numpy(np.stack([sample.ids_T for sample in samples]))
    return Batch(
        tokens_BS=ids_BT[:, :-1].contiguous(),
        labels_BS=ids_BT[:, 1:].contiguous(),
        loss_mask_BS=torch.from_numpy(np.stack([sample.loss_mask_S for sample in samples])),
        position_ids_BS=torch.from_numpy(np.stack([sample.position_ids_S for sample in samples])),
        samples_B=torch.arange(first, first + len(samples)),
    )


def micro_batches(
    samples: SampleSource,
    *,
    position: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """Return one rank's micro-batches of the step that starts at sample ``position``.

    Together the ranks see each sample of ``[position, position + global_batch_size)`` once, for
    any ``dp_size`` and ``micro_batch_size`` whose product divides ``global_batch_size``.

    Args:
        samples: Source of the samples.
        position: Samples consumed before this step: ``step * global_batch_size`` if the batch
            size never changed.
        global_batch_size: Samples per step; divisible by ``micro_batch_size * dp_size``.
        micro_batch_size: ``B``.
        dp_rank: Data-parallel rank.
        dp_size: Number of data-parallel ranks.
    """
    return [
        make_batch(
            [samples[position + i] for i in range(start, start + micro_batch_size)],
            first=position + start,
        )
        for start in _starts(global_batch_size, micro_batch_size, dp_rank, dp_size)
    ]


def validation_batches(
    samples: Chunked, *, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Batch]:
    """Return one rank's part of the first ``num_samples`` chunks, in the order of the text.

    Every rank gets the same number of micro-batches, as collectives require. Padding samples have
    a loss mask of zero. If both the losses and the mask are summed over dp ranks before dividing,
    the mean is the same for any layout. A text with fewer chunks contributes all of them.
    """
    num_samples = min(num_samples, samples.num_chunks)
    round_size = micro_batch_size * dp_size
    padded = -(-num_samples // round_size) * round_size
    batches = []
    for start in _starts(padded, micro_batch_size, dp_rank, dp_size):
        indices = range(start, start + micro_batch_size)
        chunks = [samples.chunk(min(i, num_samples - 1)) for i in indices]
        batch = make_batch(chunks, first=start)
        counts_B1 = torch.tensor([[i < num_samples] for i in indices])
        batches.append(replace(batch, loss_mask_BS=batch.loss_mask_BS * counts_B1))
    return batches


def slice_for_context_parallel(batch: Batch, *, cp_rank: int, cp_size: int) -> Batch:
    """Return the slice of each sequence that one cp rank holds: ``(B, S)`` to ``(B, S / cp)``.

    `parallel.sequence.zigzag` defines the slice.

    Raises:
        ConfigError: ``2 * cp_size`` does not divide ``S``.
    """
    if cp_size == 1:
        return batch
    seq_length = batch.tokens_BS.shape[1]
    if seq_length % (2 * cp_size):
        raise ConfigError(
            f"data.seq_length ({seq_length}) must be divisible by 2 * "
            f"parallel.context_parallel_size = {2 * cp_size}, because each cp rank holds two "
            "chunks of every sequence"
        )

    return batch.map(lambda x_BS: zigzag(x_BS, dim=1, cp_rank=cp_rank, cp_size=cp_size))


def _starts(total: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Return the starts of the rank's micro-batches in ``range(total)``: every ``dp_size``-th."""
    return range(dp_rank * micro_batch_size, total, dp_size * micro_batch_size)
