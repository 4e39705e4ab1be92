"""Which tokens each data-parallel rank sees at each step, and its part of a long sequence.

Sample ``k`` of a run is a function of (data, seed, k) alone. The layout, the number of ranks and
the batch sizes decide who computes a sample, never which samples a step has, so a run can change
its layout in the middle; its place in the data is one number, the samples consumed so far.

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
    """What the model is given for one micro batch."""

    tokens_BS: Tensor
    """Input ids, int64."""

    labels_BS: Tensor
    """The token that follows each input, int64."""

    loss_mask_BS: Tensor
    """1.0 where the loss counts, float32."""

    position_ids_BS: Tensor
    """Place of each token in its sequence, int64; it survives slicing."""

    samples_B: Tensor
    """Number of each sample in the run, or in the text that it validates on, int64."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``change`` applied to every tensor of tokens, e.g. a copy to the GPU."""
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            labels_BS=change(self.labels_BS),
            loss_mask_BS=change(self.loss_mask_BS),
            position_ids_BS=change(self.position_ids_BS),
        )


def make_batch(samples: Sequence[Sample], *, first: int = 0) -> Batch:
    """``B`` samples of one length, side by side as model inputs, numbered from ``first``."""
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
    """The micro batches of one rank for the step that starts at sample ``position``.

    Together the ranks see samples ``[position, position + global_batch_size)``, each once, for
    any ``dp_size`` and ``micro_batch_size`` that divide it.

    Args:
        samples: Where the samples come from.
        position: Samples consumed before this step: ``step * global_batch_size`` while the batch
            size never changed.
        global_batch_size: Samples of the step; divisible by ``micro_batch_size * dp_size``.
        micro_batch_size: ``B``.
        dp_rank: The rank's place among those that hold the same part of the model.
        dp_size: How many of them there are.
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
    """One rank's part of the first ``num_samples`` chunks, in the order of the text.

    Every rank gets as many micro batches as the others, as collectives need; where samples run
    out, their loss mask is zero. So the mean over the mask, summed over dp ranks before it is
    divided, is the same number for any layout. A text with fewer chunks gives all it has.
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
    """The part of each sequence that one cp rank holds: ``(B, S)`` to ``(B, S / cp)``.

    Which part is `parallel.sequence.zigzag`'s.

    Raises:
        ConfigError: ``2 * cp_size`` does not divide ``S``.
    """
    if cp_size == 1:
        return batch
    seq_length = batch.tokens_BS.shape[1]
    if seq_length % (2 * cp_size):
        raise ConfigError(
            f"data.seq_length ({seq_length}) must be divisible by 2 * "
            f"parallel.context_parallel_size = {2 * cp_size}: each cp rank holds two runs of it"
        )

    return batch.map(lambda x_BS: zigzag(x_BS, dim=1, cp_rank=cp_rank, cp_size=cp_size))


def _starts(total: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Where the rank's micro batches start within ``range(total)``: every ``dp_size``-th is its."""
    return range(dp_rank * micro_batch_size, total, dp_size * micro_batch_size)
