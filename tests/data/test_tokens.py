"""Text in any of its three forms is tokenized once and completely, for Megatron-Core to read."""

import json
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_moe.data.stream import TokenStream, split_documents
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.data.tokens import _cached, prepare_tokens
from megatron_moe.errors import DataError

TEXTS = ["one document\n", "another, \u00e9 and \u6f22\n\nwith lines", "third"]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def prepare(path: Path, folder: Path, vocab_size: int = 600) -> Path:
    cache = path.parent / "cache"
    return prepare_tokens(path, dense_folder=folder, vocab_size=vocab_size, cache_dir=cache)


def test_jsonl_round_trip_through_megatron(tmp_path: Path, bpe_folder: Path):
    prefix = prepare(jsonl(tmp_path / "text.jsonl", [*TEXTS, ""]), bpe_folder)
    dataset, tokenizer = IndexedDataset(str(prefix)), load_tokenizer(bpe_folder)
    assert [sequence.tolist() for sequence in dataset] == [
        [*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS
    ]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.index.dtype == np.uint16


def test_a_text_file_is_one_document_whose_blocks_change_no_id(
    tmp_path: Path,
    bpe_folder: Path,
    library_files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    path = tmp_path / "library.txt"
    path.write_text("".join(file.read_text() for file in library_files[:6]))
    assert path.stat().st_size > 50_000
    stream = TokenStream(prepare(path, bpe_folder), vocab_size=600)
    tokenizer = load_tokenizer(bpe_folder)
    assert stream.num_documents == 1
    whole = [*tokenizer.encode(path.read_text()), tokenizer.eos_id]
    assert stream.read(0, stream.num_tokens).tolist() == whole


def test_a_pair_of_megatron_is_used_as_it_is(tmp_path: Path, bpe_folder: Path):
    prefix = tmp_path / "pair"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(torch.arange(7), [7])
    builder.add_document(torch.arange(3), [3])
    builder.finalize(f"{prefix}.idx")
    for path in (prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        assert prepare(path, bpe_folder) == prefix
    stream = TokenStream(prefix, vocab_size=7)
    assert stream.read(5, 4).tolist() == [5, 6, 0, 1]
    with pytest.raises(DataError, match=r"contains id 6, .*vocab_size is 6"):
        TokenStream(prefix, vocab_size=6)


def test_tokens_are_made_once_and_again_after_a_change(tmp_path: Path, bpe_folder: Path):
    path = jsonl(tmp_path / "text.jsonl", TEXTS)
    first = prepare(path, bpe_folder)
    written = os.stat(f"{first}.bin").st_mtime_ns
    assert prepare(path, bpe_folder) == first
    assert os.stat(f"{first}.bin").st_mtime_ns == written
    jsonl(path, [*TEXTS, "more"])
    assert prepare(path, bpe_folder) != first


def test_jobs_that_race_leave_one_whole_pair(tmp_path: Path, bpe_folder: Path):
    path = jsonl(tmp_path / "text.jsonl", TEXTS * 50)
    prefixes: list[Path] = []
    jobs = [
        threading.Thread(target=lambda: prefixes.append(prepare(path, bpe_folder)))
        for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(prefixes) == 4
    assert len(set(prefixes)) == 1
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    assert names == {f"{prefixes[0].name}{suffix}" for suffix in (".bin", ".idx", ".json")}
    assert len(IndexedDataset(str(prefixes[0]))) == 150


def test_no_job_that_races_fails(tmp_path: Path):
    """Eight jobs at a time, whose text takes no time, so that they meet at the lock."""

    def write(unfinished: Path) -> None:
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{unfinished}{suffix}").write_text("tokens")

    text = tmp_path / "text.txt"
    text.write_text("text")
    for attempt in range(100):
        cache = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as jobs:
            futures = [
                jobs.submit(_cached, text, cache, depends_on="rules", write=write) for _ in range(8)
            ]
        assert len({future.result() for future in futures}) == 1
        assert sorted(file.suffix for file in cache.iterdir()) == [".bin", ".idx", ".json"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, bpe_folder: Path):
    path = jsonl(tmp_path / "text.jsonl", TEXTS)
    with path.open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError):
        prepare(path, bpe_folder)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON: Expecting value"),
        ("a.jsonl", b'\n{"txt": "x"}\n', r"a.jsonl:2: has no key 'text', only 'txt'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: 'text' must be a string, not int"),
        ("a.jsonl", b'["x"]\n', r"a.jsonl:1: must be an object with the key 'text', not list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": ""}\n', r"a.jsonl contains no text: 1 empty"),
        ("a.txt", b"", r"a.txt contains no text"),
        ("a.txt", b"a\nb\xff\n", r"a.txt:2: not UTF-8: invalid start byte"),
        ("a.txt", b"a\nb\xe6\xbc", r"a.txt:2: not UTF-8: the file ends inside a character"),
        ("a.txt", b"\x7fELF\n\x00", r"a.txt:2: zero byte: this is a binary file"),
    ],
)
def test_bad_text_is_refused_with_its_place(
    tmp_path: Path, bpe_folder: Path, name: str, content: bytes, message: str
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(path, bpe_folder)


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path: Path, bpe_folder: Path):
    with pytest.raises(DataError, match=r"nothing does not exist"):
        prepare(tmp_path / "nothing", bpe_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .jsonl, .* file"):
        prepare(tmp_path / "empty", bpe_folder)


def test_a_folder_is_its_files_and_made_anew_when_one_changes(tmp_path: Path, bpe_folder: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    jsonl(folder / "b.jsonl", TEXTS)
    (folder / "a.txt").write_text("first of all")
    stream = TokenStream(first := prepare(folder, bpe_folder), vocab_size=600)
    tokenizer = load_tokenizer(bpe_folder)
    assert stream.num_documents == 1 + len(TEXTS)
    start = tokenizer.encode("first of all")
    assert stream.read(0, len(start)).tolist() == start
    assert prepare(folder, bpe_folder) == first
    (folder / "a.txt").write_text("another first")
    assert prepare(folder, bpe_folder) != first


def test_documents_are_found_where_they_begin(tmp_path: Path):
    lengths = [5, 1, 7, 3]
    builder = IndexedDatasetBuilder(f"{tmp_path}/pair.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(torch.arange(length), [1, length - 1] if length > 1 else [1])
    builder.finalize(f"{tmp_path}/pair.idx")
    for documents, starts in ((slice(None), [0, 5, 6, 13]), (slice(1, 3), [0, 1])):
        stream = TokenStream(tmp_path / "pair", vocab_size=9, documents=documents)
        for start in range(stream.num_tokens):
            for count in range(1, stream.num_tokens - start + 1):
                expected = [s - start for s in starts if start <= s < start + count]
                assert stream.document_starts(start, count) == expected


def test_a_broken_pair_is_refused(tmp_path: Path, bpe_folder: Path):
    prefix = prepare(jsonl(tmp_path / "text.jsonl", TEXTS), bpe_folder)
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole, whole_index = data.read_bytes(), index.read_bytes()

    data.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"has {len(whole) - 2} bytes, but .* {len(whole)}"):
        TokenStream(prefix, vocab_size=600)
    data.write_bytes(b"")
    with pytest.raises(DataError, match="bin is empty"):
        TokenStream(prefix, vocab_size=600)
    data.write_bytes(whole)
    for broken, message in (
        (b"hello", "does not begin with MMIDIDX"),
        (whole_index[:20], "does not begin with MMIDIDX"),
        (whole_index[:-5], rf"has {len(whole_index) - 5} bytes, .* requires {len(whole_index)}"),
        (whole_index[:17] + b"\x07" + whole_index[18:], "tokens of type code 7"),
    ):
        index.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            TokenStream(prefix, vocab_size=600)
    index.unlink()
    with pytest.raises(DataError, match="idx does not exist"):
        prepare(prefix, bpe_folder)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=2, max_size=12),
    st.floats(0.01, 0.99),
)
def test_a_split_loses_no_document_and_cuts_none(lengths: list[list[int]], fraction: float):
    """Documents have several sequences; token ids count up, so each id is its own position."""
    with tempfile.TemporaryDirectory() as folder:
        prefix, token, starts = Path(folder) / "pair", 0, []
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for document in lengths:
            starts.append(token)
            for length in document:
                builder.add_item(torch.arange(token, token + length))
                token += length
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        training, validation = split_documents(
            prefix, vocab_size=token, validation_fraction=fraction
        )
        target = token * (1 - fraction)
        cut = min(starts[1:], key=lambda start: abs(start - target))
        assert training.read(0, training.num_tokens).tolist() == list(range(cut))
        assert validation.read(0, validation.num_tokens).tolist() == list(range(cut, token))
        assert training.num_documents + validation.num_documents == len(lengths)


def test_one_document_is_not_split(tmp_path: Path, bpe_folder: Path):
    prefix = prepare(jsonl(tmp_path / "text.jsonl", ["one"]), bpe_folder)
    with pytest.raises(DataError, match="is one document, which cannot be split"):
        split_documents(prefix, vocab_size=600, validation_fraction=0.5)
