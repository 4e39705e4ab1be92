"""Tokenizing a corpus gives the same tokens for any number of workers, format and kills."""

import gzip
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.data import corpus
from megatron_moe.data.corpus import tokenize_files
from megatron_moe.data.documents import ReadPosition, read_blocks, split_pieces
from megatron_moe.data.encode import Encoded, Rules
from megatron_moe.data.files import find_files
from megatron_moe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moe.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="module")
def texts(library_files: list[Path]) -> list[str]:
    """Functions and classes of Python's standard library, some of them twice."""
    whole = "".join(file.read_text() for file in library_files[:12])
    parts = [part for part in whole.split("\n\n\n") if part]
    return parts + random.Random(0).sample(parts, 40)


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def documents(prefix: Path) -> list[list[int]]:
    """Return the documents that Megatron-Core reads, with their sequences joined."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices.tolist()
    return [[t for s in range(a, b) for t in dataset[s].tolist()] for a, b in pairwise(bounds)]


def expected(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_documents_come_in_order_from_any_number_of_workers(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, workers: int, monkeypatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 20_000)
    path = jsonl(tmp_path / "a.jsonl", texts)
    report = tokenize_files([path], tmp_path / "out", tokenizer, workers=workers)
    assert documents(tmp_path / "out") == expected(texts, tokenizer)
    assert report.counts.documents == len(texts)
    assert report.counts.tokens == sum(map(len, expected(texts, tokenizer)))
    assert report.counts.characters == sum(map(len, texts))
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out.json").read_text())["counts"]["tokens"] == (
        report.counts.tokens
    )


def _gzip(path: Path, texts: list[str]) -> Path:
    plain = jsonl(path / "a.jsonl", texts)
    (path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return path / "a.jsonl.gz"


def _zstd(path: Path, texts: list[str]) -> Path:
    zstandard = pytest.importorskip("zstandard")
    lines = jsonl(path / "a.jsonl", texts).read_bytes().splitlines(keepends=True)
    # Two frames, like the output of `cat a.zst b.zst`.
    frames = [zstandard.compress(b"".join(part)) for part in (lines[:9], lines[9:])]
    (path / "a.jsonl.zst").write_bytes(b"".join(frames))
    return path / "a.jsonl.zst"


def _parquet(path: Path, texts: list[str]) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path / "a.parquet", row_group_size=100)
    return path / "a.parquet"


def _arrow(path: Path, texts: list[str]) -> Path:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": texts})
    with pa.OSFile(str(path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as s:
        s.write_table(table, max_chunksize=50)
    return path / "a.arrow"


@pytest.mark.parametrize("write", [_gzip, _zstd, _parquet, _arrow])
def test_every_format_gives_the_same_documents(
    tmp_path: Path,
    texts: list[str],
    tokenizer: Tokenizer,
    write: Callable[[Path, list[str]], Path],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 20_000)
    monkeypatch.setattr("megatron_moe.data.tables._ROWS", 20)
    path = write(tmp_path, texts)
    tokenize_files([path], tmp_path / "out", tokenizer)
    assert documents(tmp_path / "out") == expected(texts, tokenizer)
    # A reader that starts at the end of any block must read exactly the rest.
    blocks = list(read_blocks([path], text_key="text", start=ReadPosition()))
    assert len(blocks) > 2
    for i, block in enumerate(blocks):
        rest = read_blocks([path], text_key="text", start=block.after)
        assert [b.records for b in rest] == [b.records for b in blocks[i + 1 :]]


def test_a_folder_is_its_files_in_order(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    jsonl(tmp_path / "in" / "b.jsonl", ["one", "two"])
    (tmp_path / "in" / "sub" / "c.txt").write_text("three\n\nparagraphs")
    jsonl(tmp_path / "in" / "a.jsonl", ["zero"])
    (tmp_path / "in" / "README.md").write_text("no document")
    tokenize_files([tmp_path / "in"], tmp_path / "out", tokenizer)
    texts = ["zero", "one", "two", "three\n\nparagraphs"]
    assert documents(tmp_path / "out") == expected(texts, tokenizer)
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        find_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .jsonl, .* in .*empty"):
        find_files([tmp_path / "empty"])


@pytest.mark.parametrize("size", [500, 3000, 30_000])
def test_pieces_of_a_text_have_the_ids_of_the_whole(
    library_files: list[Path], tokenizer: Tokenizer, size: int
):
    text = "".join(file.read_text() for file in library_files[:4])
    pieces = list(split_pieces(text, size=size))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= size
    assert len(pieces) < 1.5 * len(text) / size
    ids = [i for part in tokenizer.encode_batch(pieces) for i in part]
    assert ids == tokenizer.encode(text)
    assert list(split_pieces("x" * 10, size=4)) == ["xxxx", "xxxx", "xx"]


class Killed(BaseException):
    """Raised by tests in place of a signal."""


def dying_after(monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> None:
    """Make the next run die while writing block ``num_blocks``."""
    take, left = TAKE, [num_blocks]

    def take_or_die(self: corpus._Job, encoded: Encoded) -> None:
        if not left[0]:
            self._writer.append(encoded.ids_T[:3], [3])
            raise Killed
        left[0] -= 1
        take(self, encoded)

    monkeypatch.setattr(corpus._Job, "_take", take_or_die)


TAKE = corpus._Job._take


@pytest.mark.parametrize("form", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, form: str, monkeypatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    monkeypatch.setattr(corpus, "_COMMIT_SECONDS", 0.0)
    path = _gzip(tmp_path, texts).with_name(form)
    if form == "a.txt":
        path.write_text("\n\u00e9 \u6f22\u5b57 ".join(texts))
    rules = Rules(drop_duplicates=True)
    whole = tokenize_files([path], tmp_path / "whole", tokenizer, rules=rules)

    kills = 0
    while not Path(f"{tmp_path}/out.idx").exists():
        dying_after(monkeypatch, 4)
        try:
            report = tokenize_files([path], tmp_path / "out", tokenizer, rules=rules)
        except Killed:
            kills += 1
    assert kills > 3
    assert report.counts == whole.counts
    for suffix in (".bin", ".idx"):
        resumed = (tmp_path / f"out{suffix}").read_bytes()
        assert resumed == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_partial_file_of_other_rules_is_not_gone_on_with(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    monkeypatch.setattr(corpus, "_COMMIT_SECONDS", 0.0)
    path = jsonl(tmp_path / "a.jsonl", texts)
    dying_after(monkeypatch, 4)
    with pytest.raises(Killed):
        tokenize_files([path], tmp_path / "out", tokenizer)
    monkeypatch.setattr(corpus._Job, "_take", TAKE)
    assert (tmp_path / "out.partial" / "journal.json").exists()
    tokenize_files([path], tmp_path / "out", tokenizer, rules=Rules(min_tokens=30))
    long = [ids for ids in expected(texts, tokenizer) if len(ids) > 30]
    assert documents(tmp_path / "out") == long


def _tokenize(path: Path, out: Path, folder: Path) -> None:
    corpus._COMMIT_SECONDS = 0.0
    tokenize_files([path], out, load_tokenizer(folder))


def test_kill_9_in_the_middle(
    tmp_path: Path,
    texts: list[str],
    bpe_folder: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    path, out = jsonl(tmp_path / "a.jsonl", texts * 5), tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(
        target=_tokenize, args=(path, out, bpe_folder)
    )
    child.start()
    while child.is_alive() and not (tmp_path / "out.partial" / "journal.json").exists():
        child.join(0.01)
    os.kill(child.pid or 0, 9)
    child.join()
    assert not Path(f"{out}.idx").exists(), "killed too late to show anything"
    tokenize_files([path], out, tokenizer)
    assert documents(out) == expected(texts, tokenizer) * 5


def test_exact_duplicates_and_lengths_are_filtered_and_counted(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 20_000)
    path = jsonl(tmp_path / "a.jsonl", [*texts, ""])
    lengths = [len(row) - 1 for row in expected(texts, tokenizer)]
    # The limits are lengths that occur, and both are inclusive.
    shortest, longest = sorted(lengths)[20], sorted(lengths)[-20]
    rules = Rules(drop_duplicates=True, min_tokens=shortest, max_tokens=longest)
    report = tokenize_files([path], tmp_path / "out", tokenizer, rules=rules, workers=2)
    ids = expected(list(dict.fromkeys(texts)), tokenizer)
    kept = [row for row in ids if shortest <= len(row) - 1 <= longest]
    assert documents(tmp_path / "out") == kept
    counts = report.counts
    assert counts.too_short == sum(length < shortest for length in lengths) > 0
    assert counts.too_long == sum(length > longest for length in lengths) > 0
    assert counts.empty == 1
    assert counts.documents == len(kept)
    left_out = counts.too_short + counts.too_long + counts.duplicates
    assert counts.documents + left_out == len(texts)


BAD = [b'{"text": "x"\n', b'{"text": null}\n', b"\xff\n", b'{"text": "\\ud800"}\n', b"[" * 9999]


def test_malformed_lines_are_skipped_up_to_a_limit(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good + good.join(BAD))
    report = tokenize_files([path], tmp_path / "out", tokenizer, max_malformed=5)
    assert documents(tmp_path / "out") == expected(["good"] * 5, tokenizer)
    assert report.counts.malformed == 5
    assert [line.split(": ")[0] for line in report.malformed] == [
        f"{path}:{number}" for number in (2, 4, 6, 8, 10)
    ]
    with pytest.raises(DataError, match=r"5 malformed .* the 4 that may(?s:.*)a.jsonl:2: not JSON"):
        tokenize_files([path], tmp_path / "other", tokenizer, max_malformed=4)


def test_a_malformed_line_is_named_by_its_place_in_the_file(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    path = jsonl(tmp_path / "a.jsonl", texts)
    with path.open("a") as file:
        file.write("broken\n")
    with pytest.raises(DataError, match=rf"a.jsonl:{len(texts) + 1}: not JSON"):
        tokenize_files([path], tmp_path / "out", tokenizer)


def test_a_text_file_longer_than_a_block_is_not_filtered_in_part(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(texts))
    tokenize_files([path], tmp_path / "out", tokenizer, rules=Rules(min_tokens=10_000))
    assert documents(tmp_path / "out") == expected([path.read_text()], tokenizer)


def test_a_long_document_is_one_sequence(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_moe.data.documents.BLOCK_SIZE", 10_000)
    text = "some words of a long line " * 2000
    tokenize_files([jsonl(tmp_path / "a.jsonl", [text])], tmp_path / "out", tokenizer)
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert len(dataset) == 1
    assert dataset[0].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_what_exists_is_not_overwritten(tmp_path: Path, tokenizer: Tokenizer):
    path = jsonl(tmp_path / "a.jsonl", ["text"])
    tokenize_files([path], tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match=r"out.idx already exists"):
        tokenize_files([path], tmp_path / "out", tokenizer)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, tokenizer: Tokenizer):
    def refusal(path: Path) -> str:
        with pytest.raises(DataError) as refused:
            tokenize_files([path], tmp_path / "out", tokenizer, rules=Rules(text_key="body"))
        return str(refused.value)

    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(gzip.compress(jsonl(tmp_path / "a.jsonl", ["x"] * 999).read_bytes())[:-9])
    assert f"cannot read {damaged}: Compressed file ended" in refusal(damaged)
    damaged.write_bytes(b"not gzip")
    assert f"cannot read {damaged}: Not a gzipped file" in refusal(damaged)
    assert "a.jsonl:1: has no key 'body', only 'text'" in refusal(tmp_path / "a.jsonl")


def test_damaged_tables_are_refused(tmp_path: Path, tokenizer: Tokenizer):
    path = _parquet(tmp_path, ["text"])
    with pytest.raises(DataError, match="has no column 'body', only id, text"):
        tokenize_files([path], tmp_path / "out", tokenizer, rules=Rules(text_key="body"))
    with pytest.raises(DataError, match="column 'id' must hold strings, not int64"):
        tokenize_files([path], tmp_path / "out", tokenizer, rules=Rules(text_key="id"))
    path.write_bytes(b"PAR1" * 9)
    with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
        tokenize_files([path], tmp_path / "out", tokenizer)
