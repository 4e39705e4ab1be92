"""Rows 2, 3, 28: a tokenizer behaves as its file says; `tokenizers` on that file is the oracle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer

from megatron_moe.data.encode import Rules
from megatron_moe.data.tokenizer import check_same_vocabulary, load_tokenizer
from megatron_moe.data.tokens import prepare_tokens
from megatron_moe.errors import DataError

TEXTS = ["import os", " one space", "  two spaces", "a\n b", "", "\u00e9 \u6f22", "x" * 40 + " end"]


def copy_with(source: Path, folder: Path, change: Any) -> Path:
    """Copy a tokenizer, with ``change`` applied to what `tokenizers` reads."""
    shutil.copytree(source, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


TRUNCATIONS = {
    "truncation": lambda t: t.enable_truncation(4),
    "padding": lambda t: t.enable_padding(length=64),
    "both": lambda t: (t.enable_truncation(4, direction="left"), t.enable_padding()),
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncation_and_padding_are_off(tmp_path: Path, bpe_folder: Path, name: str):
    folder = copy_with(bpe_folder, tmp_path / "copy", TRUNCATIONS[name])
    oracle = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(TEXTS) == [oracle.encode(text).ids for text in TEXTS]
    assert [tokenizer.encode(text) for text in TEXTS] == tokenizer.encode_batch(TEXTS)


PREFIXES = {
    "llama-2": lambda t: setattr(
        t, "normalizer",
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    ),
    "always": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    ),
    "never": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    ),
    "first": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["LlamaTokenizer", "LlamaTokenizerFast", None])
def class_name(request: pytest.FixtureRequest) -> str | None:
    return request.param


@pytest.mark.parametrize("prefix", PREFIXES)
def test_ids_are_those_of_the_file(
    tmp_path: Path, library_files: list[Path], prefix: str, class_name: str | None
):
    written = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    PREFIXES[prefix](written)
    written.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
    )
    written.train([str(path) for path in library_files[:8]], trainer)
    content = json.loads(written.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary pieces
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    written = Tokenizer.from_str(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    if class_name:
        config["tokenizer_class"] = class_name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == [written.encode(text).ids for text in TEXTS]
    assert tokenizer.eos_id == written.token_to_id("</s>")
    for text in TEXTS:
        ids = written.encode(text).ids
        assert tokenizer.decode(ids) == written.decode(ids, skip_special_tokens=False)


def test_transformers_still_names_the_end(bpe_folder: Path):
    assert (
        load_tokenizer(bpe_folder).eos_id == AutoTokenizer.from_pretrained(bpe_folder).eos_token_id
    )


ADDED = {
    "pad": AddedToken("<pad>", special=True),
    "mask": AddedToken("<mask>", special=True, lstrip=True),
    "tool": AddedToken("<tool_call>", special=False),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_beyond_the_embedding_are_allowed_while_no_text_uses_them(
    tmp_path: Path, bpe_folder: Path, name: str
):
    token = ADDED[name]
    folder = copy_with(bpe_folder, tmp_path / "copy", lambda t: t.add_tokens([token]))
    rows = Tokenizer.from_file(str(bpe_folder / "tokenizer.json")).get_vocab_size()
    tokenizer = load_tokenizer(folder, vocab_size=rows)
    assert tokenizer.vocab_size == rows + 1
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": f"fine {token.content}"}) + "\n")
    where: dict[str, Any] = {"dense_folder": folder, "vocab_size": rows, "cache_dir": tmp_path}
    if token.special:  # it is encoded as plain text
        prepare_tokens(path, **where)
        return
    with pytest.raises(DataError, match=r":1: no row of the embedding for '<tool_call>'"):
        prepare_tokens(path, **where)
    path.write_text('{"text": "fine"}\n')
    prepare_tokens(path, **where, rules=Rules())


CHANGES: dict[str, Any] = {
    "other words": lambda t: t["model"]["vocab"].update(_swapped(t["model"]["vocab"])),
    "another control token": lambda t: _renamed(t, "<|im_start|>", "<|turn|>"),
}


def _renamed(tokenizer: dict[str, Any], before: str, now: str) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab[now] = vocab.pop(before)
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace(before, now)


def _swapped(vocab: dict[str, int]) -> dict[str, int]:
    first, second = list(vocab)[300:302]
    return {first: vocab[second], second: vocab[first]}


@pytest.mark.parametrize("name", CHANGES)
def test_models_of_other_tokenizers_are_not_mixed(tmp_path: Path, bpe_folder: Path, name: str):
    """Row 36."""
    shutil.copytree(bpe_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    check_same_vocabulary(bpe_folder, [tmp_path / "other", tmp_path])
    content = json.loads(path.read_text())
    CHANGES[name](content)
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"upcycle\.mix_with.*have different tokenizers: id \d+ is"):
        check_same_vocabulary(bpe_folder, [tmp_path / "other"])


def test_other_templates_and_added_tokens_are_mixed(tmp_path: Path, bpe_folder: Path):
    folder = copy_with(bpe_folder, tmp_path / "copy", lambda t: t.add_tokens(["<tool>"]))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    check_same_vocabulary(bpe_folder, [folder])


def test_pieces_beyond_the_embedding_are_refused(bpe_folder: Path):
    with pytest.raises(DataError, match="no row in the embedding"):
        load_tokenizer(bpe_folder, vocab_size=500)
