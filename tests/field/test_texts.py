"""Rows 5, 6, 11, 22, 32, 34: text under the names, in the folders and formats that people have.

Expected ids are those of `tokenizers` on texts that Python's own library or pyarrow has read.
"""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from megatron_moe.data.corpus import tokenize_files
from megatron_moe.data.encode import Rules
from megatron_moe.data.files import find_files, left_out
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.data.tokens import prepare_tokens
from megatron_moe.errors import DataError

TEXTS = ["def f(x):\n    return x\n", "  two spaces", "\u00e9 \u6f22\u5b57 \U0001f600"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def expected(folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = oracle.token_to_id("<|endoftext|>")
    return [[*oracle.encode(text).ids, eos] for text in texts]


def tokenized(path: Path, folder: Path, out: Path, **rules: Any) -> list[list[int]]:
    tokenize_files([path], out, load_tokenizer(folder), rules=Rules(**rules))
    return documents(out)


# ---- names ---------------------------------------------------------------------------------------

LINE_NAMES = (
    "x.JSONL", "x.jsonl.00001", "x.jsonl-00003-of-00008", "x.ndjson", "x.jsonlines", "x.Json",
    "x.part-2.jsonl", "x.jsonl.part-2",
)  # fmt: skip


@pytest.mark.parametrize("name", LINE_NAMES)
def test_json_lines_under_another_name(tmp_path: Path, bpe_folder: Path, name: str):
    (tmp_path / name).write_text(LINES)
    assert tokenized(tmp_path / name, bpe_folder, tmp_path / "out") == expected(bpe_folder)


@pytest.mark.parametrize("name", ["x", "x.bak", "x.txt", "x.jsonl~", "x.log"])
def test_json_lines_under_a_name_of_plain_text_are_refused(
    tmp_path: Path, bpe_folder: Path, name: str
):
    (tmp_path / name).write_text(LINES)
    with pytest.raises(DataError, match=r"(?s):1: the file holds JSON lines.*end in \.jsonl"):
        tokenized(tmp_path / name, bpe_folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.html", "a.csv.gz", "a.zip", "a.csv.00001"])
def test_formats_that_are_not_read_are_refused(tmp_path: Path, bpe_folder: Path, name: str):
    (tmp_path / name).write_text("text,label\nhello,1\n")
    with pytest.raises(DataError, match=r"files are not read.*(?s:.*)\.jsonl, .*\.parquet"):
        tokenized(tmp_path / name, bpe_folder, tmp_path / "out")


def test_text_that_only_looks_a_little_like_json_is_text(tmp_path: Path, bpe_folder: Path):
    (tmp_path / "a.tex").write_text(text := "{\\bf bold} {x}\n")
    (tmp_path / "b.py").write_text(code := "{1: 'x'}\n")
    for name, content in (("a.tex", text), ("b.py", code)):
        ids = tokenized(tmp_path / name, bpe_folder, tmp_path / f"out-{name}")
        assert ids == expected(bpe_folder, [content])


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_with_links_hidden_files_and_other_names(tmp_path: Path, bpe_folder: Path):
    inside, outside = tmp_path / "data", tmp_path / "outside"
    for folder in (inside / ".ipynb_checkpoints", outside / "deep"):
        folder.mkdir(parents=True)
    (outside / "deep" / "far.jsonl").write_text(LINES)
    (inside / "linked").symlink_to(outside)  # a linked folder is followed
    (inside / "linked-too").symlink_to(outside)  # and read once
    (outside / "deep" / "up").symlink_to(outside)  # and a loop ends
    (inside / "near.TXT").write_text("near")
    (inside / "same.txt").symlink_to(inside / "near.TXT")
    (inside / ".hidden.txt").write_text("hidden")
    (inside / ".ipynb_checkpoints" / "near-checkpoint.txt").write_text("hidden")
    (inside / "README.md").write_text("# Data")
    (inside / "table.csv").write_text("a,b")
    assert [path.name for path in find_files([inside])] == ["far.jsonl", "near.TXT"]
    assert [path.name for path in left_out([inside])] == ["README.md", "table.csv"]
    report = tokenize_files([inside], tmp_path / "out", load_tokenizer(bpe_folder))
    assert documents(tmp_path / "out") == expected(bpe_folder, [*TEXTS, "near"])
    assert report.left_out == [str(inside / "README.md"), str(inside / "table.csv")]


# ---- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, bpe_folder: Path, name: str):
    content = LINES if ".jsonl" in name else TEXTS[0]
    raw = b"\xef\xbb\xbf" + content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    texts = TEXTS if ".jsonl" in name else [TEXTS[0]]
    assert tokenized(tmp_path / name, bpe_folder, tmp_path / "out") == expected(bpe_folder, texts)


def test_a_byte_order_mark_before_a_long_document(
    tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 100)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + (text := "some words here " * 50).encode())
    tokenize_files([tmp_path / "a.txt"], tmp_path / "out", load_tokenizer(bpe_folder))
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert len(dataset.document_indices) == 2  # one document
    ids = [i for row in documents(tmp_path / "out") for i in row]
    assert ids == expected(bpe_folder, [text])[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be-sig"])
def test_utf_16_is_refused_by_name(tmp_path: Path, bpe_folder: Path, encoding: str):
    text = "hello"
    raw = b"\xfe\xff" + text.encode("utf-16-be") if "be" in encoding else text.encode("utf-16")
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(DataError, match=r"(?s)UTF-16.*iconv"):
        tokenized(tmp_path / "a.txt", bpe_folder, tmp_path / "out")


# ---- compression and tables ----------------------------------------------------------------------


def _long_window(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()  # the size stays unknown, so the header states the window
    return stream.compress(data) + stream.flush()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "x.jsonl.zst": _long_window, "x.jsonl.bz2": bz2.compress, "x.jsonl.xz": lzma.compress,
    "x.JSONL.GZ": gzip.compress,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_lines(tmp_path: Path, bpe_folder: Path, name: str):
    (tmp_path / name).write_bytes(COMPRESSIONS[name](LINES.encode()))
    assert tokenized(tmp_path / name, bpe_folder, tmp_path / "out") == expected(bpe_folder)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_damaged_compressed_lines_are_refused(tmp_path: Path, bpe_folder: Path, name: str):
    (tmp_path / name).write_bytes(COMPRESSIONS[name](LINES.encode() * 100)[:-20])
    with pytest.raises(DataError, match=r"cannot read|not JSON"):
        tokenized(tmp_path / name, bpe_folder, tmp_path / "out")


def test_frames_of_zstd_one_after_the_other(tmp_path: Path, bpe_folder: Path):
    frames = [zstandard.compress(line.encode()) for line in LINES.splitlines(keepends=True)]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    assert tokenized(tmp_path / "x.jsonl.zst", bpe_folder, tmp_path / "o") == expected(bpe_folder)


COLUMNS = {
    "string": pa.array(TEXTS), "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "binary": pa.array([text.encode() for text in TEXTS]),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("container", ["parquet", "file", "stream", "feather"])
def test_tables_of_every_kind(tmp_path: Path, bpe_folder: Path, kind: str, container: str):
    table = pa.table({"id": [1, 2, 3], "body": COLUMNS[kind]})
    path = tmp_path / {"file": "a.arrow", "stream": "b.arrow"}.get(container, f"c.{container}")
    if container == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif container == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        new = pa.ipc.new_file if container == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    result = tokenized(path, bpe_folder, tmp_path / "out", text_key="body")
    assert result == expected(bpe_folder)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), "must hold strings, not int64"),
        (pa.array([["a"], ["b"]]), "must hold strings, not list"),
        (pa.array([b"fine", b"\xff"]), ":2: column 'text' is not UTF-8 at byte 0"),
    ],
)
def test_columns_that_are_not_text_are_refused(
    tmp_path: Path, bpe_folder: Path, column: pa.Array, message: str
):
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        tokenized(tmp_path / "a.parquet", bpe_folder, tmp_path / "out")


# ---- keys and BOS --------------------------------------------------------------------------------


def test_text_under_another_key_in_training(tmp_path: Path, bpe_folder: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"content": text, "text": 1}) + "\n" for text in TEXTS))
    where: dict[str, Any] = {"dense_folder": bpe_folder, "vocab_size": 600, "cache_dir": tmp_path}
    prefix = prepare_tokens(path, **where, rules=Rules(text_key="content"))
    assert documents(prefix) == expected(bpe_folder)
    with pytest.raises(DataError, match="'text' must be a string"):  # and the cache is not shared
        prepare_tokens(path, **where)


def test_documents_begin_with_bos_if_asked(tmp_path: Path, bpe_folder: Path):
    folder = tmp_path / "with-bos"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bpe_folder / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|im_start|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.jsonl").write_text(LINES)
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = oracle.token_to_id("<|im_start|>")
    result = tokenized(tmp_path / "a.jsonl", folder, tmp_path / "out", add_bos=True)
    assert result == [[bos, *ids] for ids in expected(bpe_folder)]
    with pytest.raises(DataError, match="needs a tokenizer with a bos_token"):
        tokenized(tmp_path / "a.jsonl", bpe_folder, tmp_path / "out2", add_bos=True)


# ---- long tokenizing -----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal: nothing may handle it."""


def test_a_killed_tokenization_continues(
    tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.corpus._COMMIT_SECONDS", -1.0)
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 200)
    (tmp_path / "a.jsonl").write_text(LINES * 20)
    calls = []

    def die_after_ten() -> None:
        calls.append(1)
        if len(calls) == 10:
            raise Killed

    where: dict[str, Any] = {"dense_folder": bpe_folder, "vocab_size": 600, "cache_dir": tmp_path}
    with pytest.raises(Killed):
        prepare_tokens(tmp_path / "a.jsonl", **where, on_progress=die_after_ten)
    died_after = len(calls)
    prefix = prepare_tokens(tmp_path / "a.jsonl", **where, on_progress=lambda: calls.append(1))
    assert documents(prefix) == expected(bpe_folder) * 20
    blocks = len(calls) - died_after
    whole: list[int] = []
    prepare_tokens(
        tmp_path / "a.jsonl", **{**where, "cache_dir": tmp_path / "other"},
        on_progress=lambda: whole.append(1),
    )  # fmt: skip
    assert blocks <= len(whole) - 9
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tok")]
