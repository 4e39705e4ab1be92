"""Test that the weights of the run in docs/data.md follow from its losses by the update rule."""

import json
import math
from pathlib import Path

import pytest

from megatron_moe.config.mixtures import SLIMPAJAMA
from research.mixing import plot

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = json.loads((DOCS / "mixing.json").read_text())


def test_weights_follow_from_losses():
    weights = [NUMBERS["start"][name] for name in SLIMPAJAMA]
    assert sum(weights) == pytest.approx(1)
    for update in range(len(NUMBERS["tokens"]) - 1):
        excess = [
            max(0.0, round(NUMBERS["losses"][name][update + 1], 4) - NUMBERS["reference"][name])
            for name in SLIMPAJAMA
        ]
        grown = [
            w * math.exp(NUMBERS["step_size"] * e) for w, e in zip(weights, excess, strict=True)
        ]
        floor = NUMBERS["floor"]
        weights = [(1 - floor) * w / sum(grown) + floor / 7 for w in grown]
        output = [NUMBERS["weights"][name][update] for name in SLIMPAJAMA]
        assert output == pytest.approx(weights, abs=1e-9), update


def test_weights_moved():
    moved = [abs(NUMBERS["weights"][n][-1] - NUMBERS["start"][n]) for n in SLIMPAJAMA]
    assert max(moved) > 0.05


def test_the_plot_is_of_these_numbers():
    assert (DOCS / "mixing.svg").read_text() == plot(NUMBERS)
