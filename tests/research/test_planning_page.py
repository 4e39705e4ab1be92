"""Test that docs/planning.md contains the tables that the code generates."""

import re

from research.calibration.document import DOCUMENT, TABLES, render


def test_the_tables_are_current():
    text = DOCUMENT.read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(TABLES)
    assert render(text) == text
