"""The page on recovery has the figures of its file."""

import json
from pathlib import Path

from research.recovery import CASES, SEEDS, table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_has_the_table_of_the_file():
    results = json.loads((DOCS / "recovery.json").read_text())
    assert {(one["case"], one["seed"]) for one in results} == {
        (case, seed) for case in CASES for seed in SEEDS
    }
    assert table(results) in (DOCS / "recovery.md").read_text()
