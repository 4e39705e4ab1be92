"""How much held-out text there is, and its loss in units that say more: perplexity, bits per byte.

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
    """The part of a domain's held-out text that a loss is taken over."""

    tokens: int
    """Tokens whose loss counts."""

    bytes: int | None
    """Bytes of UTF-8 text that they stand for; None where there is no tokenizer to tell."""

    def figures(self, loss: float) -> dict[str, float | None]:
        """``loss`` (nats per token) by its name, and what follows from it."""
        bits = loss * self.tokens / math.log(2)
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": bits / self.bytes if self.bytes else None,
        }


class ByteCount:
    """Counts the bytes of text that tokens of a tokenizer stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sizes_V = tokenizer.bytes_by_id()
        self._eos_id = tokenizer.eos_id
        # Llama 2 puts a space before each text, which decoding takes away again.
        self._before_text = int(self._sizes_V[tokenizer.encode("x")].sum()) - len("x")

    def of_labels(self, sample: Sample) -> int:
        """Bytes of the labels whose loss counts: special tokens are none."""
        counted_S = sample.loss_mask_S > 0
        labels_S = sample.ids_T[1:]
        known_S = counted_S & (labels_S < len(self._sizes_V))
        begins_S = counted_S & (sample.ids_T[:-1] == self._eos_id)
        sizes = self._sizes_V[labels_S[known_S]].sum()
        return int(sizes) - self._before_text * int(begins_S.sum())


def held_out_sizes(
    texts: Mapping[str, Chunked], *, num_samples: int, tokenizer_folder: Path
) -> dict[str, HeldOut]:
    """How much of each text is judged: as much as `validation_batches` takes.

    Args:
        texts: Held-out text of each domain.
        num_samples: Sequences of each text, from its beginning.
        tokenizer_folder: The dense model's folder, or what is left of it.

    Raises:
        DataError: A tokenizer that cannot be read.
    """
    count = None
    if any((tokenizer_folder / name).exists() for name in _TOKENIZERS):
        count = ByteCount(load_tokenizer(tokenizer_folder))
    sizes = {}
    for name, text in texts.items():
        samples = [text.chunk(i) for i in range(min(num_samples, text.num_chunks))]
        tokens = sum(int(np.count_nonzero(sample.loss_mask_S)) for sample in samples)
        found = None if count is None else sum(map(count.of_labels, samples))
        sizes[name] = HeldOut(tokens, found)
    return sizes
