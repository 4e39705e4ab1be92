"""Pack whole conversations into samples, each conversation with its own positions.

Shape letters of this module:

    S  seq_length
    T  S + 1: the inputs and the token after the last
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.data.order import permuted
from megatron_moe.data.packing import pack
from megatron_moe.data.samples import Sample
from megatron_moe.data.stream import check_ids, nearest_document, open_pair
from megatron_moe.errors import DataError


class ChatSamples:
    """Packed conversations from a token file of `chat.write_conversations`, shuffled by a seed.

    A sample holds several conversations and padding. Positions restart at 0 with each conversation,
    so `packing.document_bounds` finds the bounds that attention must not cross. The loss counts on
    the assistant's messages, and never on the first token of the next conversation.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        seq_length: int,
        vocab_size: int,
        seed: int,
        conversations: slice = slice(None),
    ) -> None:
        """Pack the conversations of ``prefix`` into samples of ``seq_length`` inputs.

        Args:
            prefix: Pair with modes.
            seq_length: ``S``.
            vocab_size: Rows of the model's embedding; all ids must be smaller.
            seed: Seed of the order of samples.
            conversations: Range of conversations to read.

        Raises:
            DataError: The pair does not exist, or every conversation is too long.
        """
        self._prefix, self._vocab_size = prefix, vocab_size
        self._seq_length, self._seed = seq_length, seed
        self._dataset = open_pair(prefix, with_modes=True)
        lengths = np.diff(_starts(self._dataset))
        read = np.arange(len(lengths))[conversations]
        fitting = read[lengths[read] <= seq_length + 1]
        self.too_long: list[int] = read[lengths[read] > seq_length + 1].tolist()
        """Indices of the conversations that are longer than a sample and are skipped."""
        if not len(fitting):
            raise DataError(
                f"each of the {len(read)} conversations in {prefix}.bin is longer than "
                f"data.seq_length + 1 = {seq_length + 1} tokens"
            )
        packs = pack(lengths[fitting].tolist(), capacity=seq_length + 1)
        self._packs = [[int(fitting[i]) for i in members] for members in packs]
        self.num_chunks = len(self._packs)
        """Number of samples per epoch."""

    def chunk(self, index: int) -> Sample:
        """Return pack ``index``, in packing order."""
        size = self._seq_length + 1
        # The id of padding is arbitrary: its loss does not count, and it comes last, so that no
        # other token attends to it.
        ids_T = np.zeros(size, dtype=np.int64)
        counts_T = np.zeros(size, dtype=np.float32)
        positions_T = np.arange(size)
        start = 0
        for conversation in self._packs[index]:
            ids, counts = self._read(conversation)
            end = start + len(ids)
            ids_T[start:end], counts_T[start:end] = ids, counts
            counts_T[start] = 0.0  # as a label it belongs to the previous conversation
            positions_T[start:end] = np.arange(len(ids))
            start = end
        positions_T[start:] = np.arange(size - start)
        return Sample(ids_T, loss_mask_S=counts_T[1:], position_ids_S=positions_T[:-1])

    def __getitem__(self, k: int) -> Sample:
        """Return sample ``k`` of the run: every pack once in each ``num_chunks`` samples."""
        epoch, index = divmod(k, self.num_chunks)
        return self.chunk(permuted(index, self.num_chunks, seed=self._seed, epoch=epoch))

    def _read(self, conversation: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a conversation, and 1.0 for each id whose loss counts."""
        index = self._dataset.index
        first, last = self._dataset.document_indices[conversation : conversation + 2]
        lengths = index.sequence_lengths[first:last]
        ids = self._dataset.bin_reader.read(
            index.dtype, int(lengths.sum()), int(index.sequence_pointers[first])
        ).astype(np.int64)
        check_ids(ids, prefix=self._prefix, vocab_size=self._vocab_size)
        modes = index.sequence_modes
        assert modes is not None, "open_pair reads modes"
        return ids, np.repeat(modes[first:last], lengths).astype(np.float32)


def split_conversations(prefix: Path, *, validation_fraction: float) -> tuple[slice, slice]:
    """Split into training conversations and the last ``validation_fraction`` of the tokens.

    Conversations are not cut.

    Raises:
        DataError: The pair does not exist, or has fewer than two conversations.
    """
    starts = _starts(open_pair(prefix, with_modes=True))
    if len(starts) < 3:
        raise DataError(
            f"{prefix} is one conversation, which cannot be split into training and validation.\n"
            "  use a separate file for validation"
        )
    wanted = starts[-1] * (1 - validation_fraction)
    cut = nearest_document(wanted, len(starts) - 1, start_of=lambda i: int(starts[i]))
    return slice(cut), slice(cut, None)


def _starts(dataset: IndexedDataset) -> np.ndarray:
    """Return the index of each conversation's first token, and the end of the last."""
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    return np.concatenate([[0], ends])[dataset.document_indices]
