"""Test that docs/planning.md contains the tables that the code generates."""

from pathlib import Path

from megatron_moe.planner.document import BLOCK, TABLES, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_tables_are_current():
    text = DOCUMENT.read_text()
    assert {match[2] for match in BLOCK.finditer(text)} == set(TABLES)
    assert render(text) == text
