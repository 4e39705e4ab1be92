"""Test that the picture and trends of docs/specialization.md follow from its numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from research.specialization import plot, trend

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = json.loads((DOCS / "specialization.json").read_text())


def test_the_picture_is_of_these_numbers():
    assert (DOCS / "specialization.svg").read_text() == plot(NUMBERS)


@pytest.mark.parametrize("step", NUMBERS["steps"])
def test_trends_follow_from_the_layers(step: str):
    rows = NUMBERS["steps"][step]
    for name, output in rows["trend"].items():
        assert output == pytest.approx(trend(rows[name]), abs=2e-5), name
    for shares_ZE in rows["shares"].values():
        assert np.sum(shares_ZE, axis=1) == pytest.approx(1, abs=1e-3)


def test_a_trend_is_what_it_says():
    assert trend([1.0, 2.0, 4.0]) == {"rank_correlation": 1.0, "shallow": 1.0, "deep": 4.0}
    assert trend([3.0, 2.0, 1.0])["rank_correlation"] == -1.0
