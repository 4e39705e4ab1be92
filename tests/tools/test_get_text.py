"""Test get_text: whole documents, a deterministic split, and a notice without the encyclopedia."""

import hashlib
import json
import zipfile
from pathlib import Path

import get_text
import pytest
from get_text import WIKI, Document, unique

from megatron_moe.errors import UserError

ARTICLES = {
    str(i): {"title": f"Title {i}", "extract": f"{i} is a number that some like. " * 20}
    for i in range(500)
} | {"stub": {"title": "Stub", "extract": "Short."}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache with a fake wheel under the name of the real one."""
    content = json.dumps(ARTICLES).encode()
    file = get_text.WheelFile(
        package=WIKI.package,
        version=WIKI.version,
        member=WIKI.member,
        sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=1,
    )
    monkeypatch.setattr(get_text, "WIKI", file)
    folder = tmp_path / "cache"
    folder.mkdir()
    wheel = f"{file.package.replace('-', '_')}-{file.version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        archive.writestr(file.member, content)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_validation_documents_are_whole_and_in_no_training_text(tmp_path: Path, cache: Path):
    get_text.get_text(tmp_path / "out", offline=False, cache=cache)
    train = read(tmp_path / "out" / "train.jsonl")
    validation = read(tmp_path / "out" / "validation.jsonl")
    assert {doc["text"] for doc in train}.isdisjoint(doc["text"] for doc in validation)
    assert {doc["source"] for doc in train}.isdisjoint(doc["source"] for doc in validation)
    for docs in (train, validation):
        assert {doc["source"].split("/")[0] for doc in docs} == {"code", "wiki"}
    wiki = [doc for doc in train + validation if doc["source"].startswith("wiki/")]
    assert len(wiki) == len(ARTICLES) - 1  # without the stub
    assert wiki[0]["text"].startswith(wiki[0]["source"].removeprefix("wiki/") + "\n\n")


def test_the_manifest_counts_what_was_written(tmp_path: Path, cache: Path):
    get_text.get_text(tmp_path / "out", offline=False, cache=cache)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {k: v["license"] for k, v in manifest["sources"].items()} == {
        "code": "PSF-2.0",
        "wiki": "CC-BY-SA-4.0",
    }
    for split in ("train", "validation"):
        docs = read(tmp_path / "out" / f"{split}.jsonl")
        for kind, count in manifest[split].items():
            texts = [doc["text"] for doc in docs if doc["source"].startswith(f"{kind}/")]
            assert count["documents"] == len(texts)
            assert count["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_the_same_twice(tmp_path: Path, cache: Path):
    for out in ("a", "b"):
        get_text.get_text(tmp_path / out, offline=False, cache=cache)
    for name in ("train.jsonl", "validation.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_offline_is_code_only_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    get_text.get_text(tmp_path / "out", offline=True, cache=tmp_path / "cache")
    assert "the encyclopedia will be missing" in capsys.readouterr().out
    train = read(tmp_path / "out" / "train.jsonl")
    assert all(doc["source"].startswith("code/") for doc in train)
    assert not any("site-packages" in doc["source"] or "/test/" in doc["source"] for doc in train)
    num_bytes = sum(len(doc["text"].encode()) for doc in train)
    assert 2e6 < num_bytes <= get_text.CODE_BYTES


def test_without_an_index_it_stops_and_names_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        UserError, match=r"(?s)cannot download ovos.*without the encyclopedia: --off"
    ):
        get_text.get_text(tmp_path / "out", offline=False, cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_no_sources_of_the_library_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="no sources of its standard library"):
        list(get_text.code(tmp_path))


def test_a_text_twice_counts_once_and_sides_do_not_depend_on_the_others():
    documents = [Document(f"code/{i}", f"text {i % 400}") for i in range(800)]
    once = unique(documents)
    assert len(once) == 400
    held_out = {doc.text for doc in once if doc.held_out}
    assert 2 <= len(held_out) <= 16  # 8 expected
    assert held_out >= {doc.text for doc in unique(documents[:100]) if doc.held_out}
