"""Tokenizers give the ids of the library that wrote them, and bad ones are rejected."""

import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.errors import DataError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  two spaces, 1234 digits\r\n\r\n",
    "\ttab \u00e9 \u6f22\u5b57 \U0001f600",
    "",
]


def test_ids_are_those_of_transformers(bpe_folder: Path):
    tokenizer = load_tokenizer(bpe_folder)
    oracle = AutoTokenizer.from_pretrained(bpe_folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (oracle.eos_token_id, len(oracle))


def test_ids_are_those_of_sentencepiece(sentencepiece_folder: Path):
    tokenizer = load_tokenizer(sentencepiece_folder)
    oracle = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (oracle.eos_id(), len(oracle))


def test_a_special_token_in_the_text_does_not_end_the_document(
    bpe_folder: Path, sentencepiece_folder: Path
):
    for folder, eos in ((bpe_folder, "<|endoftext|>"), (sentencepiece_folder, "</s>")):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(f"a {eos} b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"a {eos} b"


def test_more_ids_than_the_embedding_has_rows_are_refused(bpe_folder: Path):
    size = load_tokenizer(bpe_folder).vocab_size
    load_tokenizer(bpe_folder, vocab_size=size)
    with pytest.raises(DataError, match=rf"ids up to {size - 1}.*vocab_size is {size - 1}"):
        load_tokenizer(bpe_folder, vocab_size=size - 1)


def test_the_fingerprint_follows_the_files(bpe_folder: Path, tmp_path: Path):
    copy = shutil.copytree(bpe_folder, tmp_path / "copy")
    assert load_tokenizer(copy).fingerprint == load_tokenizer(bpe_folder).fingerprint
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|end_im|>"))
    assert load_tokenizer(copy).fingerprint != load_tokenizer(bpe_folder).fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer: no tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot read the tokenizer"),
        ({"tokenizer.model": "not a model"}, "is not a SentencePiece model"),
    ],
)
def test_what_is_no_tokenizer_is_said_so(tmp_path: Path, files: dict[str, str], message: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(bpe_folder: Path, tmp_path: Path):
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(tmp_path)
