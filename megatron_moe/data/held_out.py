"""Measure held-out text, and convert its loss to perplexity and bits per byte.

Nats per token of two tokenizers cannot be compared; bits per byte of the same text can.

Shape letters of this module:

    S  seq_length   T  S + 1   V  ids of the tokenizer
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moe.data.samples import Chunked, Sample
from megatron_moe.data.tokenizer import Tokenizer, load_tokenizer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Size of the held-out text of one domain over which a loss is computed."""

    tokens: int
    """Tokens whose loss counts."""

    bytes: int | None
    """Bytes of UTF-8 text that the tokens encode; None if there is no tokenizer."""

    def figures(self, loss: float) -> dict[str, float | None]:
        """Return ``loss`` (nats per token), perplexity and bits per byte by name."""
        bits = loss * self.tokens / math.log(2)
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": bits / self.bytes if self.bytes else None,
        }


class ByteCount:
    """Count the bytes of text that the tokens of a tokenizer encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sizes_V = tokenizer.bytes_by_id()
        self._eos_id = tokenizer.eos_id
        # Llama 2 adds a space before each text, which decoding removes again.
        self._before_text = int(self._sizes_V[tokenizer.encode("x")].sum()) - len("x")

    def of_labels(self, sample: Sample) -> int:
        """Return the bytes of the labels whose loss counts; special tokens have 0 bytes."""
        counted_S = sample.loss_mask_S > 0
        labels_S = sample.ids_T[1:]
        known_S = counted_S & (labels_S < len(self._sizes_V))
        begins_S = counted_S & (sample.ids_T[:-1] == self._eos_id)
        sizes = self._sizes_V[labels_S[known_S]].sum()
        return int(sizes) - self._before_text * int(begins_S.sum())


def held_out_sizes(
    texts: Mapping[str, Chunked], *, num_samples: int, tokenizer_folder: Path
) -> dict[str, HeldOut]:
    """Return the size of each held-out text, limited to the samples of `validation_batches`.

    Args:
        texts: Held-out text of each domain.
        num_samples: Number of sequences of each text, from its beginning.
        tokenizer_folder: The dense model's folder. It may lack a tokenizer or be deleted.

    Raises:
        DataError: The tokenizer cannot be read.
    """
    count = None
    if any((tokenizer_folder / name).exists() for name in _TOKENIZERS):
        count = ByteCount(load_tokenizer(tokenizer_folder))
    sizes = {}
    for name, text in texts.items():
        samples = [text.chunk(i) for i in range(min(num_samples, text.num_chunks))]
        tokens = sum(int(np.count_nonzero(sample.loss_mask_S)) for sample in samples)
        num_bytes = None if count is None else sum(map(count.of_labels, samples))
        sizes[name] = HeldOut(tokens, num_bytes)
    return sizes
