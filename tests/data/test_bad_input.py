"""Run the real command on each bad input in the table of docs/data.md, and check its message."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny import TOKENIZER_SIZE, save_dense, save_tokenizer

from megatron_moe.cli import main as cli
from megatron_moe.data.stream import TokenStream
from megatron_moe.data.tokens import prepare_tokens

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
LINE = b'{"text": "some words"}\n'
TEXTS = {
    "empty file": ("a.txt", b"", r"a\.txt contains no text"),
    "binary file": ("a.txt", b"\x7fELF\n\x00\x01", r"a\.txt:2: zero byte: this is a binary file"),
    "invalid UTF-8 in a text": ("a.txt", b"ab\nc\xff", r"a\.txt:2: not UTF-8"),
    "invalid UTF-8 in a line": ("a.jsonl", LINE + b'{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
    "wrong key": ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: has no key 'text', only 'txt'"),
}
SETTINGS = {
    "missing file of a domain": (["data.domains.b.path=nowhere"], "nowhere does not exist"),
    "missing domain of a preset": (["data.domains.a.weight=null", "data.domains.b.weight=null",
                                    "data.mixing.weights=llama"], r"missing \['arxiv', 'books'"),
    "weight 0": (["data.domains.a.weight=0", "data.domains.b.weight=1"],
                 r"weight of domain 'a' \(0\.0\) must be positive"),
    "sum not 1": (["data.domains.a.weight=7"], r"sum to 7\.5, .*(?s:.*)a: 0\.9333, b: 0\.06667"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, library_files: list[Path]) -> Path:
    root = tmp_path_factory.mktemp("bad")
    save_tokenizer(root / "dense", library_files)
    return save_dense(root / "dense", vocab_size=TOKENIZER_SIZE)


@pytest.fixture
def config(tmp_path: Path, dense: Path) -> Path:
    text = tmp_path / "good.txt"
    text.write_text("good words " * 200)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "source": {"path": str(dense)}, "moe": {"num_moe_experts": 4},
        "data": {"domains": {n: {"path": str(text), "weight": 0.5} for n in "ab"},
                 "seq_length": 16},
        "train": {"steps": 0},
    }))  # fmt: skip
    return path


def refusal(config: Path, *overrides: str, monkeypatch, capsys) -> str:
    """Return the command's stderr; it must end with exit code 2 and without a traceback."""
    monkeypatch.setattr(sys, "argv", ["megatron-moe", "train", str(config), *overrides])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.distributed
@pytest.mark.parametrize("case", TEXTS)
def test_a_bad_text_is_refused_with_its_place(
    config: Path, tmp_path: Path, case: str, monkeypatch, capsys
):
    name, content, message = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    stderr = refusal(
        config, f"data.domains.b.path={tmp_path / name}", monkeypatch=monkeypatch, capsys=capsys
    )
    assert re.search(message, stderr), stderr
    assert f"| {case} |" in PAGE


@pytest.mark.distributed
@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_mixture_is_refused(config: Path, case: str, monkeypatch, capsys):
    overrides, message = SETTINGS[case]
    stderr = refusal(config, *overrides, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(message, stderr), stderr
    assert f"| {case} |" in PAGE


@pytest.mark.distributed
def test_a_vocabulary_larger_than_the_models_is_refused(
    config: Path, dense: Path, library_files: list[Path], tmp_path: Path, monkeypatch, capsys
):
    small = save_dense(tmp_path / "small", vocab_size=TOKENIZER_SIZE - 1)
    save_tokenizer(small, library_files)
    stderr = refusal(config, f"source.path={small}", monkeypatch=monkeypatch, capsys=capsys)
    assert "has ids up to 599, but the model's vocab_size is 599: id 599 has no row" in stderr
    assert "| vocabulary larger than the model's |" in PAGE


@pytest.mark.parametrize("length", [2_000_000, pytest.param(50_000_000, marks=pytest.mark.slow)])
def test_one_long_document_is_a_document(dense: Path, tmp_path: Path, length: int):
    """Reading and tokenizing in blocks must keep a long document whole."""
    words = "in the middle of a long document there are words "
    (tmp_path / "long.txt").write_text(text := words * (length // len(words)))
    prefix = prepare_tokens(
        tmp_path / "long.txt", dense_folder=dense, vocab_size=600, cache_dir=tmp_path / "cache"
    )
    assert TokenStream(prefix, vocab_size=600).num_documents == 1
    report = json.loads(Path(f"{prefix}.json").read_text())["counts"]
    assert (report["documents"], report["characters"], report["malformed"]) == (1, len(text), 0)
    assert "| one 50 MB document |" in PAGE
