"""Numbered samples out of a token stream.

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
    """Inputs are all but the last id, labels all but the first."""

    loss_mask_S: NDArray[np.float32]
    """1.0 where the loss of the label counts."""

    position_ids_S: Tokens
    """Place of each input in its document, as far as documents are told apart."""


class SampleSource(Protocol):
    """A numbered sequence of samples."""

    def __getitem__(self, k: int) -> Sample:
        """Sample ``k``: the same whenever and wherever it is asked for."""
        ...


class Chunked(Protocol):
    """A finite set of samples in a fixed order, as validation reads it."""

    num_chunks: int

    def chunk(self, index: int) -> Sample:
        """Sample ``index`` of the set."""
        ...


class Text(SampleSource, Chunked, Protocol):
    """A finite set of samples that is read in epochs: what a domain trains or is judged on."""


class Samples:
    """The chunks of a token stream, endlessly, each epoch in another order.

    The stream is cut every ``seq_length`` tokens, whatever document is there; documents are kept
    apart by their end-of-text token only, as in the pre-training of Llama 2, or by their positions
    too. What is left at the end, shorter than a chunk, is never seen.
    """

    def __init__(
        self, stream: TokenStream, *, seq_length: int, seed: int, reset_positions: bool = False
    ) -> None:
        """Samples of ``seq_length`` input tokens in the order of ``seed``.

        Args:
            stream: The text.
            seq_length: ``S``.
            seed: Of the order.
            reset_positions: Count positions from 0 again where a document begins.

        Raises:
            DataError: The stream is shorter than one sample.
        """
        self._stream = stream
        self._seq_length = seq_length
        self._seed = seed
        self._reset_positions = reset_positions
        self.num_chunks = (stream.num_tokens - 1) // seq_length
        """Samples of one epoch."""
        if self.num_chunks < 1:
            raise DataError(
                f"{stream.prefix}.bin has {stream.num_tokens} tokens, fewer than one sample of "
                f"data.seq_length + 1 = {seq_length + 1}.\n  give it more text, or shorten "
                "data.seq_length"
            )

    def chunk(self, index: int) -> Sample:
        """Chunk ``index`` in the order of the text; its last token opens the next one."""
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
        """Sample ``k`` of the run: every chunk once in each ``num_chunks`` samples."""
        epoch, place = divmod(k, self.num_chunks)
        return self.chunk(permuted(place, self.num_chunks, seed=self._seed, epoch=epoch))
