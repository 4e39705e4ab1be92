"""Cut a token stream into numbered samples.

Shape letters of this module:

    S  seq_length
    T  S + 1: a chunk of the stream and the token after it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_moe.data.order import permuted
from megatron_moe.data.stream import Tokens, TokenStream
from megatron_moe.errors import DataError


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence."""

    ids_T: Tokens
    """Token ids. Inputs are all but the last, labels all but the first."""

    loss_mask_S: NDArray[np.float32]
    """1.0 where the loss of the label counts."""

    position_ids_S: Tokens
    """Position of each input in its document, or in the sequence if positions are not reset."""


class SampleSource(Protocol):
    """A numbered sequence of samples."""

    def __getitem__(self, k: int) -> Sample:
        """Return sample ``k``; every call on every rank returns the same sample."""
        ...


class Chunked(Protocol):
    """A finite set of samples in a fixed order, for validation."""

    num_chunks: int

    def chunk(self, index: int) -> Sample:
        """Return sample ``index`` of the set."""
        ...


class Text(SampleSource, Chunked, Protocol):
    """A finite set of samples that is read in epochs, for training or validation of a domain."""


class Samples:
    """Endless sequence of the chunks of a token stream, in another order every epoch.

    The stream is cut every ``seq_length`` tokens, regardless of documents. Documents are separated
    only by their end-of-text token, as in the pre-training of Llama 2, or also by their positions.
    The remainder at the end, shorter than a chunk, is dropped.
    """

    def __init__(
        self, stream: TokenStream, *, seq_length: int, seed: int, reset_positions: bool = False
    ) -> None:
        """Cut ``stream`` into samples of ``seq_length`` input tokens, shuffled by ``seed``.

        Args:
            stream: Token stream.
            seq_length: ``S``.
            seed: Seed of the order.
            reset_positions: Restart positions at 0 at the beginning of every document.

        Raises:
            DataError: The stream is shorter than one sample.
        """
        self._stream = stream
        self._seq_length = seq_length
        self._seed = seed
        self._reset_positions = reset_positions
        self.num_chunks = (stream.num_tokens - 1) // seq_length
        """Number of samples per epoch."""
        if self.num_chunks < 1:
            raise DataError(
                f"{stream.prefix}.bin has {stream.num_tokens} tokens, fewer than one sample of "
                f"data.seq_length + 1 = {seq_length + 1}.\n  provide more text or reduce "
                "data.seq_length"
            )

    def chunk(self, index: int) -> Sample:
        """Return chunk ``index`` in the order of the text; chunks overlap by one token."""
        start, length = index * self._seq_length, self._seq_length
        position_ids_S = np.arange(length)
        if self._reset_positions:
            for begin in self._stream.document_starts(start, length):
                position_ids_S[begin:] = np.arange(length - begin)
        return Sample(
            self._stream.read(start, length + 1),
            loss_mask_S=np.ones(length, dtype=np.float32),
            position_ids_S=position_ids_S,
        )

    def __getitem__(self, k: int) -> Sample:
        """Return sample ``k`` of the run: every chunk once in each ``num_chunks`` samples."""
        epoch, index = divmod(k, self.num_chunks)
        return self.chunk(permuted(index, self.num_chunks, seed=self._seed, epoch=epoch))
