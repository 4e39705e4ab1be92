"""Test that the tables of docs/growing.md follow from its numbers, and that runs are comparable."""

import json

import pytest

from research.growing_page import NUMBERS, PAGE, differences, ratio, render, verdict

RESULTS = json.loads(NUMBERS.read_text())


def test_the_tables_are_of_these_numbers():
    text = PAGE.read_text()
    assert render(text, RESULTS) == text
    assert all(f"<!-- table: {name} -->" in text for name in ("origin", "runs", "differences"))


def test_runs_with_equal_top_k_have_equal_costs():
    """But for the 8 more rows of the router."""
    for name in ("noise", "load", "utility", "bias"):
        assert ratio(RESULTS, name, "16 from the start", "tokens") == "1.000"
        assert 0.995 < float(ratio(RESULTS, name, "16 from the start", "teraflops")) <= 1
    for name, other in (("top-4", "16 top-4 from the start"), ("top-2", "16 from the start")):
        equal = ratio(RESULTS, f"exact, FLOPs of {name}", other, "teraflops")
        assert float(equal) == pytest.approx(1, abs=0.01)  # a whole number of steps


def test_exact_growth_begins_where_the_source_ends():
    begins = {(r["case"], r["seed"]): r["validation"][0][1] for r in RESULTS["runs"]}
    for case, seed in begins:
        if case.startswith("exact"):
            assert begins[case, seed] == pytest.approx(begins["8 experts", seed], abs=1e-4)


def test_seeds_are_compared_one_by_one():
    numbers = {"runs": [
        {"case": case, "seed": seed, "validation": [[0, 5.0], [9, loss]]}
        for case, losses in {"a": (1.0, 2.0, 3.5), "b": (2.0, 3.0, 3.0)}.items()
        for seed, loss in enumerate(losses)
    ]}  # fmt: skip
    assert differences(numbers, "a", "b") == [-1.0, -1.0, 0.5]
    assert verdict([-1.0, -1.0, 0.5]) == "disagree, mean -0.500"
    assert (verdict([0.1] * 3), verdict([-0.1] * 3)) == ("A is higher", "A is lower")
    assert verdict([0.1] * 2) == "too few"
