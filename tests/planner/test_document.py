"""docs/planning.md holds what the code prints."""

from pathlib import Path

from megatron_moe.planner.document import BLOCK, TABLES, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_tables_are_current():
    text = DOCUMENT.read_text()
    assert {found[2] for found in BLOCK.finditer(text)} == set(TABLES)
    assert render(text) == text
