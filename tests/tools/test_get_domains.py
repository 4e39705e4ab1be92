"""Test get_domains: seven domains or an error, whole lines, no addresses, checked downloads."""

import email
import hashlib
import json
import tarfile
from pathlib import Path

import get_domains
import pytest
import registries
from get_domains import SET_NAMES, mail_text, parts
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.mixtures import SLIMPAJAMA
from megatron_moe.errors import UserError

TEXT = "Some words that are long enough to be no stub of a document.\n" * 5


def slimpajama(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    records = [
        {"text": f"{name} {i} {TEXT}", "meta": {"redpajama_set_name": name}}
        for name in names
        for i in range(3)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "chunk1.jsonl").write_text(lines)
    return folder


def test_shards_of_slimpajama_become_domains(tmp_path: Path):
    shards = slimpajama(tmp_path / "shards", [*SET_NAMES])
    get_domains.get_domains(tmp_path / "out", local=shards, cache=tmp_path)
    for set_name, domain in SET_NAMES.items():
        lines = (tmp_path / "out" / f"{domain}.jsonl").read_text().splitlines()
        assert len(lines) == 3
        assert all(json.loads(line)["text"].startswith(set_name) for line in lines)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert tuple(manifest["domains"]) == SLIMPAJAMA
    assert manifest["domains"]["c4"]["documents"] == 3
    get_domains.get_domains(tmp_path / "out", local=shards, cache=tmp_path)  # does nothing
    with pytest.raises(UserError, match="was created for another request"):
        get_domains.get_domains(tmp_path / "out", local=tmp_path, cache=tmp_path)


def test_files_and_folders_may_name_a_domain(tmp_path: Path):
    shards = slimpajama(tmp_path / "shards", [*SET_NAMES][2:])
    (shards / "c4").mkdir()
    (shards / "c4" / "page.txt").write_text(TEXT)
    (shards / "commoncrawl.jsonl").write_text(json.dumps({"text": TEXT}))
    get_domains.get_domains(tmp_path / "out", local=shards, cache=tmp_path)
    assert json.loads((tmp_path / "out" / "c4.jsonl").read_text())["text"] == TEXT.strip()


def test_a_domain_without_text_is_an_error_and_leaves_nothing(tmp_path: Path):
    shards = slimpajama(tmp_path / "shards", [*SET_NAMES][1:])
    with pytest.raises(UserError, match="has no text of commoncrawl"):
        get_domains.get_domains(tmp_path / "out", local=shards, cache=tmp_path)
    assert not (tmp_path / "out").exists()


@given(st.lists(st.sampled_from(["", "x" * 50, "y" * 15_000])))
def test_parts_are_whole_lines_and_nothing_but_a_stub_is_lost(lines: list[str]):
    text = "\n".join(lines)
    joined = "".join(parts(text))
    assert text.startswith(joined)
    assert len(text) - len(joined) < get_domains.SHORTEST
    assert all(part.endswith("\n") for part in [*parts(text)][:-1])


def test_a_mail_is_its_words():
    message = email.message_from_string(
        "From: a@b.org\nSubject: Hello\nContent-Type: text/html\n\n"
        "<html><style>p {}</style><p>Write to <b>me</b>: some.one@example.org</p>   </html>"
    )
    assert mail_text(message).split() == ["Hello", "Write", "to", "me:", "<address>"]


def test_another_archive_under_the_same_name_is_refused(tmp_path: Path):
    archive = tmp_path / "scope-thing-1.0.tgz"
    (tmp_path / "package").mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    known = hashlib.sha256(archive.read_bytes()).hexdigest()
    folder = registries.npm_package(
        "@scope/thing@1.0", sha256=known, to=tmp_path / "out", cache=tmp_path
    )
    assert folder.is_dir()
    with pytest.raises(UserError, match="is not the expected archive"):
        registries.npm_package("@scope/thing@1.0", sha256="0", to=tmp_path / "x", cache=tmp_path)
    assert not archive.exists()


def test_a_machine_without_a_client_gets_the_alternatives(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no apt-get .*(?s:.*)--local FOLDER"):
        registries.debian_packages(("some-doc",), to=tmp_path / "out", cache=tmp_path)
