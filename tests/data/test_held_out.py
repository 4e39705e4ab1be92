"""Byte counts of held-out text equal those of the text itself, for any tokenizer."""

import math
from pathlib import Path

import numpy as np
import pytest
from tiny import save_dense

from megatron_moe.data.held_out import ByteCount, HeldOut, held_out_sizes
from megatron_moe.data.samples import Sample
from megatron_moe.data.tokenizer import load_tokenizer

DOCUMENTS = ["caf\u00e9 \u6f22\u5b57 \U0001f600\n", "def f(x):\n    return x + 1\n", "</s> <0x0A>"]


class Row:
    """All documents as one sequence, after the end-of-text token of a previous document."""

    num_chunks = 1

    def __init__(self, folder: Path, *, counted: slice = slice(None)) -> None:
        tokenizer = load_tokenizer(folder)
        self._ids = [i for text in DOCUMENTS for i in (*tokenizer.encode(text), tokenizer.eos_id)]
        self._counted = counted

    def chunk(self, index: int) -> Sample:
        mask_S = np.zeros(len(self._ids), dtype=np.float32)
        mask_S[self._counted] = 1.0
        # The row starts with an end of text, so that every token of the documents is a label.
        ids_T = np.array([self._ids[-1], *self._ids])
        return Sample(ids_T, loss_mask_S=mask_S, position_ids_S=np.arange(len(mask_S)))


@pytest.mark.parametrize("kind", ["bpe_folder", "sentencepiece_folder"])
def test_bytes_are_those_of_the_text(kind: str, request: pytest.FixtureRequest):
    """The bytes of one character may span tokens, and special tokens are not text."""
    folder = request.getfixturevalue(kind)
    (size,) = held_out_sizes({"a": Row(folder)}, num_samples=3, tokenizer_folder=folder).values()
    assert size.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert size.tokens == len(Row(folder).chunk(0).ids_T) - 1


def test_what_the_loss_leaves_out_is_no_text(bpe_folder: Path):
    first = len(load_tokenizer(bpe_folder).encode(DOCUMENTS[0]))
    row = Row(bpe_folder, counted=slice(first))
    assert ByteCount(load_tokenizer(bpe_folder)).of_labels(row.chunk(0)) == len(
        DOCUMENTS[0].encode()
    )


def test_without_a_tokenizer_there_are_no_bytes(tmp_path: Path, bpe_folder: Path):
    dense = save_dense(tmp_path / "dense")
    sizes = held_out_sizes({"a": Row(bpe_folder)}, num_samples=1, tokenizer_folder=dense)
    assert sizes["a"].bytes is None
    assert sizes["a"].figures(2.0)["bits_per_byte"] is None


def test_figures_of_a_coin():
    """Two equally likely tokens of two bytes each give 1 bit per token, 0.5 bits per byte."""
    figures = HeldOut(tokens=10, bytes=20).figures(math.log(2))
    assert figures == pytest.approx({"loss": math.log(2), "perplexity": 2.0, "bits_per_byte": 0.5})
    assert HeldOut(tokens=1, bytes=1).figures(1e4)["perplexity"] == math.inf
