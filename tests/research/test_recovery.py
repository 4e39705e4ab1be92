"""The page on recovery has the figures of its files, and these have every case."""

import re

from research import recovery, solving
from research.recovery_page import DOCS, PAGE, render, results


def test_the_tables_are_of_these_numbers():
    text = PAGE.read_text()
    assert render(text) == text, "run python -m research.recovery_page"
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == {"step0", "trained", "costs"}
    assert (DOCS / "recovery.svg").read_text() == recovery.plot(results("recovery"))


def test_every_case_was_run():
    assert [one["case"] for one in results("solving")] == list(solving.CASES)
    assert {(one["case"], one["seed"]) for one in results("recovery")} == {
        (case, seed) for case in recovery.CASES for seed in recovery.SEEDS
    }
