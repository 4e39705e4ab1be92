"""The package speaks plain American English: patterns of its former dialect stay out.

The patterns are few and certain. A page is plain when an engineer reads it once without going back,
which no test can tell.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_moe"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(
    path for folder in ("tools", "bench", "research") for path in (ROOT / folder).rglob("*.py")
)

FIRST_WORDS = ("Of", "Whose", "Where", "The same", "What", "How")
"""A docstring starts with a verb or names its subject, and not with one of these."""

PHRASES = {
    r"\bgoes? on from there\b": "resumes",
    r"\bhas got on\b": "makes progress",
    r"\bleave --?\w+ away\b": "remove",
    r"\bis told\b|\bare told\b": "name who says what to whom",
    r"\bwhat was found\b": "the result",
    r"\bthe same at the end\b": "repeat the noun",
    r"\bholds? as many\b": "an equal share",
    r"\b(colour|normalis|initialis|renormalis|behaviour|neighbour|serialis)\w*": "American",
}
"""Phrases that readers stumbled over, and what to write instead."""

NAMES = ("found", "told", "fate", "Fate", "Wish", "wish", "Seat", "seat")
"""Names that mean nothing without the line that sets them."""


TEST_NAMES = re.compile(r"_(told|tells?|go(es)?_on|says?_so|gets?_on)(_|$)")
"""Words of the dialect in names of tests: report, resume, continue, make progress."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes and functions, and of fields."""
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for child in body if isinstance(body, list) else []:
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield child.lineno, value.value


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=relative)
def test_docstrings_begin_with_a_verb_or_a_subject(path: Path):
    starts = tuple(f"{word} " for word in FIRST_WORDS)
    wrong = [
        (line, text.split("\n")[0])
        for line, text in docstrings(ast.parse(path.read_text()))
        if text.lstrip().startswith(starts)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_phrases_of_the_dialect_stay_out(path: Path):
    text = path.read_text()
    wrong = {
        match.group(): instead
        for pattern, instead in PHRASES.items()
        for match in re.finditer(pattern, text)
    }
    assert wrong == {}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_names_say_what_they_hold(path: Path):
    names = {
        (node.id, node.lineno)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMES
    }
    assert names == set()


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=relative)
def test_test_names_are_plain(path: Path):
    names = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if TEST_NAMES.search(name)] == []
