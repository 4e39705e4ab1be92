"""Test the HTML of pages: escaping of names, notes on missing parts, and atomic writes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic_runs import DOMAINS, HOSTILE, analysis, write_run
from training_runs import tree

from megatron_moe.analyze.record import Analysis
from megatron_moe.commands.report import compare
from megatron_moe.config.run import Parallel
from megatron_moe.errors import ConfigError
from megatron_moe.parallel.layout import fold, local_experts
from megatron_moe.report.compare import differences
from megatron_moe.report.grids import draw_grids
from megatron_moe.report.html import Html, el, join, plain
from megatron_moe.report.page import run_page, write_page
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import read_run
from megatron_moe.report.specialization import mean_distances, share_of_mean


class Elements(HTMLParser):
    """The elements, attributes and text of a page, as a browser parses them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("reports"), steps=30, layers=4, experts=16, name="a <b>run"
    )


@pytest.fixture(scope="module")
def elements(run: Path) -> Elements:
    return Elements(run_page(read_run(run)))


def test_names_out_of_files_stay_text(elements: Elements):
    assert {"script", "img", "b"} & set(elements.tags) <= {"b"}  # facts use <b>
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    for name in (*DOMAINS, "a <b>run"):
        assert name in elements.text, name


def test_a_page_loads_and_runs_nothing(elements: Elements):
    policy = next(value for name, value in elements.attributes if name == "content")
    assert policy is not None
    assert "default-src 'none'" in policy
    links = [v for name, v in elements.attributes if name in ("href", "src", "xlink:href") and v]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not [v for _, v in elements.attributes if v and "url(" in v and "url(#" not in v]


def test_ids_are_unique_and_links_lead_somewhere(elements: Elements):
    ids = [value for name, value in elements.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = [v for name, v in elements.attributes if name in ("href", "xlink:href", "clip-path")]
    wanted = [re.sub(r"^(url\()?#|\)$", "", v) for v in wanted if v and "#" in v[:5]]
    assert set(wanted) <= set(ids)


def test_every_picture_has_a_description(elements: Elements):
    pictures = elements.tags.count("figure")
    labels = [v for name, v in elements.attributes if name == "aria-label" and v]
    assert pictures > 20
    assert any(HOSTILE in label for label in labels)
    assert elements.tags.count("figcaption") == pictures


def test_missing_parts_name_the_command_that_produces_them(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    settings = tree(folder, tmp_path / "dense", tmp_path / "tokens")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    text = "".join(Elements(run_page(read_run(folder))).text)
    for command in ("train", "evaluate", "analyze"):
        assert f"megatron-moe {command} {folder}" in text
    for phrase in ("No step has been logged", "no receipt", "data.domains", "number of ranks"):
        assert phrase in text


def test_a_page_is_written_atomically(tmp_path):
    write_page(Html("first"), tmp_path / "p.html")
    write_page(Html("second"), tmp_path / "p.html")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.html", "second")]
    with pytest.raises(ConfigError, match="must be a folder"):
        write_page(Html("x"), tmp_path / "p.html" / "in-a-file.html")
    write_page(Html("in a new folder"), tmp_path / "folder" / "p.html")
    with pytest.raises(IsADirectoryError):
        write_page(Html("x"), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "p.html"]


# ---- escaping ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [HOSTILE, "a & b", "'\"<>", "</style>", "\u202eevil", "\ud800\x00"]
)
def test_text_and_attributes_come_back_as_they_were(text: str):
    page = Elements(el("p", text, title=text))
    assert page.tags == ["p"]
    assert "".join(page.text) == plain(text)
    assert page.attributes == [("title", plain(text))]
    page_text = join([text])
    page_text.encode("utf-8")  # a lone surrogate would raise


@pytest.mark.parametrize(
    "name", [HOSTILE, "$x_", "_hidden", "#000001 font: x;", "\u4e2d\u6587", ""]
)
def test_a_line_may_have_any_name(name: str):
    values = np.array([1.0, 2.0])
    lines = [Line(name, [1, 2], values), Line("other", [1, 2], values)]
    page = Elements(line_picture(lines, alt=name, y=name))
    assert page.text.count(name) == 2 or not name  # in the legend and above the axis
    assert "script" not in page.tags


# ---- what is drawn -------------------------------------------------------------------------------


def test_a_grid_shows_every_rank_once_in_both_views():
    layout = fold(
        Parallel(tensor_parallel_size=2, pipeline_parallel_size=2, expert_parallel_size=4),
        world_size=16,
    )
    page = Elements(draw_grids(layout, stage=1, num_experts=8))
    numbers = sorted(int(text) for text in page.text if text.isdigit())
    assert numbers == sorted([*range(8, 16)] * 2)
    held = [local_experts(layout, rank=rank, num_experts=8) for rank in range(8, 12)]
    for experts in held:
        assert f"{experts[0]}\u2013{experts[-1]}" in page.text


def test_the_same_ep_rank_has_the_same_color_in_both_grids():
    layout = fold(Parallel(tensor_parallel_size=2, expert_parallel_size=4), world_size=8)
    drawn = draw_grids(layout, stage=0, num_experts=8)
    cells = re.findall(r'style="fill:var\(--line-(\d)\)"[^>]*></rect><text[^>]*>(\d+)<', drawn)
    colors: dict[str, set[str]] = {}
    for color, rank in cells:
        colors.setdefault(rank, set()).add(color)
    assert colors == {str(rank): {str(rank % 4)} for rank in range(8)}


def test_shares_and_distances_of_known_preferences():
    counts_E = np.array([30.0, 10.0, 0.0, 0.0])
    assert share_of_mean(counts_E).tolist() == [3.0, 1.0, 0.0, 0.0]
    record = analysis(np.random.default_rng(0), 10, 2, 4)
    size = len(DOMAINS)
    apart = (1 - np.eye(size)).tolist()
    record["distances"] = {
        "layers": [np.zeros((size, size)).tolist(), apart],
        "mean": apart,
        "within": {},
    }
    validated = Analysis.model_validate_json(json.dumps(record))
    assert mean_distances(validated).tolist() == [0.0, 1.0]


# ---- compare -------------------------------------------------------------------------------------


def test_compare_shows_both_runs_and_what_differs(run: Path, tmp_path: Path):
    other = write_run(tmp_path, steps=20, layers=4, experts=16, name="other", seed=1)
    page = Elements(compare([run, other], tmp_path / "both.html").read_text())
    assert page.text.count("a <b>run") > 5
    different = differences([read_run(run).config, read_run(other).config])
    assert different["train.steps"] == ["30", "20"]
    assert "moe.num_moe_experts" not in different
    assert {"run.seed", "train.steps"} <= set(page.text)


def test_compare_wants_two_runs(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="at least two different runs"):
        compare([run, run], tmp_path / "out.html")
