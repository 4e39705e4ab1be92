"""docs/performance.md says what bench/results hold, and a growth that is known is found."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield
    for name in set(sys.modules) - before:  # names such as `page` are the scripts' own
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == ROOT / "bench":
            del sys.modules[name]


def test_tables_are_those_of_the_results():
    import page

    text = (ROOT / "docs" / "performance.md").read_text()
    assert page.rendered(text) == text, "run python bench/page.py"
    assert set(page.TABLES) == set(re.findall(r"<!-- table: (\w+) -->", text))


def test_missing_measurements_are_reported(tmp_path: Path):
    import page

    text = "<!-- table: construct -->\nold\n<!-- end -->\n"
    none = page.rendered(text, tmp_path)
    assert none == "<!-- table: construct -->\nNot measured yet.\n<!-- end -->\n"
    machine = {
        "time": "2026-11-22T10:00+00:00", "cores": 2, "processor": "x", "load_before": 0.5,
        "commit": "abc", "torch": "1", "megatron-core": "2", "transformers": "3",
    }  # fmt: skip
    case = {"weights": "random", "seconds": 61.2, "peak_mib": 1234, "machine": machine}
    (tmp_path / "construct.json").write_text(json.dumps({"clustering": case}))
    assert "| clustering | random | 30 layers | 61 | 1,234 | 0.5 |" in page.rendered(text, tmp_path)


def test_a_power_is_found_and_drawn():
    from growth import exponent
    from plot import Curve, log_log

    seconds = [3.0, 12.0, 48.0]
    assert exponent((8, 16, 32), seconds) == {"fitted": 2.0, "last": 2.0}
    svg = log_log((8, 16, 32), [Curve("square", seconds)], x_label="experts", y_label="s")
    points = svg.split('points="')[1].split('"')[0].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert (y0 - y1) / (x1 - x0) == pytest.approx((y1 - y2) / (x2 - x1), rel=0.01)  # a line
