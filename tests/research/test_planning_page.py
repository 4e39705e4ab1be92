"""Test that docs/planning.md contains the tables that the code generates."""

from research.calibration.document import BLOCK, DOCUMENT, TABLES, render


def test_the_tables_are_current():
    text = DOCUMENT.read_text()
    assert {match[2] for match in BLOCK.finditer(text)} == set(TABLES)
    assert render(text) == text
