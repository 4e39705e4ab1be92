"""Test the page of ``plan --report``: its numbers, its pictures, and that names stay text."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from dense_models import DENSE_MODELS

from megatron_moe.commands.plan import plan
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.whole_run import Circumstances
from megatron_moe.report.bars import bar_figure

SPEC = spec_from_config(DENSE_MODELS["Meta-Llama-3-8B"])


def config_of(source: str = "models/Meta-Llama-3-8B", **parallel: int) -> RunConfig:
    return build(RunConfig, {
        "run": {"dir": "run"}, "source": {"path": source}, "moe": {"num_moe_experts": 8},
        "data": {"path": "text", "seq_length": 8192}, "parallel": parallel,
        "train": {"steps": 1000, "global_batch_size": 256},
    })  # fmt: skip


class Text(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.fixture(scope="module")
def searched():
    return plan(config_of(), SPEC, Circumstances(price=2.0), gpus=128, gpu="h100", check_only=False)


def test_a_page_shows_the_numbers_of_the_plan(searched, tmp_path: Path):
    path = tmp_path / "plan.html"
    searched.write_page(path)
    page = path.read_text()
    shown, best = Text(page), searched.best
    assert "script" not in shown.tags
    assert shown.tags.count("svg") == 4  # two grids, memory, time
    for words in (
        f"{best.time.mfu:.1f}%",
        f"causal; {best.time.mfu_full_attention:.1f}% with full attention",
        f"{best.memory.total:.1f} GiB",
        "GPU-hours",
        "token all-to-all",
        "NVLink",
        "Layouts that fit, the fastest first",
        "at the given price",
    ):
        assert words in shown.text, words
    assert len(page) < 200_000


def test_a_checked_layout_that_does_not_fit_shows_why(tmp_path: Path):
    config = config_of(expert_parallel_size=8)
    checked = plan(config, SPEC, Circumstances(), gpus=8, gpu="h100", check_only=True)
    checked.write_page(tmp_path / "plan.html")
    text = Text((tmp_path / "plan.html").read_text()).text
    assert "GiB too many" in text
    assert "16 h100 instead of 8" in text


def test_an_illegal_layout_has_no_page(tmp_path: Path):
    config = config_of(tensor_parallel_size=3)
    checked = plan(config, SPEC, Circumstances(), gpus=8, gpu="h100", check_only=True)
    assert not checked.legal
    with pytest.raises(ConfigError, match="needs a legal layout"):
        checked.write_page(tmp_path / "plan.html")
    assert not (tmp_path / "plan.html").exists()


def test_names_stay_text(tmp_path: Path):
    config = config_of(source="models/<script>alert(1)</script>", expert_parallel_size=8)
    plan(config, SPEC, Circumstances(), gpus=64, gpu="h100", check_only=True).write_page(
        tmp_path / "plan.html"
    )
    page = (tmp_path / "plan.html").read_text()
    assert "script" not in Text(page).tags


def test_bars_are_as_long_as_their_values():
    parts = {"small": 1.0, "large": 4.0, "nothing": 0.0}
    page = bar_figure("Memory", parts, unit="GiB", note="")
    (picture,) = re.findall(r"<svg.*?</svg>", page)
    bars = [float(bar.attrib["width"]) for bar in ElementTree.fromstring(picture).iter("rect")]
    assert bars[0] == pytest.approx(4 * bars[1], abs=0.5)
    assert len(bars) == 2
    assert "nothing" in page  # in the table
    assert 'aria-label="Memory: large 80.0%, small 20.0%."' in picture
