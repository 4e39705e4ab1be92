"""Tests of metrics.jsonl: one line per step, each step once, even after crashes."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_moe.train.metrics import MetricsWriter, expert_loads


def write_steps(folder: Path, steps: range, *, resumed_step: int, run: str = "a") -> None:
    writer = MetricsWriter(folder, [], resumed_step=resumed_step)
    for step in steps:
        writer.write({"step": step, "loss/lm": 1 / (step + 1), "run": run})
    writer.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["run"]) for line in lines(folder)]


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path):
    writer = MetricsWriter(tmp_path, [], resumed_step=0)
    writer.write({"step": 1, "loss/lm": 2.5, "router/entropy_by_layer": [0.5, 0.25]})
    assert lines(tmp_path) == [{"step": 1, "loss/lm": 2.5, "router/entropy_by_layer": [0.5, 0.25]}]
    writer.close()


@pytest.mark.parametrize("resumed_step", [1, 3, 6])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, resumed_step: int):
    write_steps(tmp_path, range(7), resumed_step=0)
    write_steps(tmp_path, range(resumed_step + 1, 9), resumed_step=resumed_step, run="b")
    assert steps_of(tmp_path) == [(s, "a" if s <= resumed_step else "b") for s in range(9)]


@pytest.mark.parametrize("cut", [1, 10, -2], ids=["one-character", "in-a-name", "without-its-end"])
def test_a_half_written_last_line_goes(tmp_path: Path, cut: int):
    write_steps(tmp_path, range(4), resumed_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss/lm": 0.2, "run": "a"})[:cut])
    write_steps(tmp_path, range(4, 6), resumed_step=3, run="b")
    assert steps_of(tmp_path) == [(0, "a"), (1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "b")]


@pytest.mark.parametrize(
    "line", [b'{"step": \xff}', b"[1]", b"1", b'{"step": null}', b'{"loss/lm": 1}']
)
def test_a_damaged_line_goes_and_blocks_no_resume(tmp_path: Path, line: bytes):
    write_steps(tmp_path, range(3), resumed_step=0)
    path = tmp_path / "metrics.jsonl"
    first, _, *others = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, *others, b""]))
    write_steps(tmp_path, range(3, 4), resumed_step=2, run="b")
    assert steps_of(tmp_path) == [(0, "a"), (2, "a"), (3, "b")]


def test_a_whole_last_line_without_its_newline_stays_a_line(tmp_path: Path):
    write_steps(tmp_path, range(3), resumed_step=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, range(3, 4), resumed_step=2, run="b")
    assert steps_of(tmp_path) == [(0, "a"), (1, "a"), (2, "a"), (3, "b")]


def test_a_run_that_never_saved_starts_its_file_anew(tmp_path: Path):
    """A run killed before its first checkpoint upcycles again, so it writes step 0 again too."""
    write_steps(tmp_path, range(3), resumed_step=0)
    write_steps(tmp_path, range(3), resumed_step=0, run="b")
    assert steps_of(tmp_path) == [(0, "b"), (1, "b"), (2, "b")]


def test_nothing_is_left_beside_the_file(tmp_path: Path):
    write_steps(tmp_path, range(3), resumed_step=0)
    write_steps(tmp_path, range(2, 3), resumed_step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_loads_are_recorded_by_layer_and_expert_over_their_mean():
    chosen_LE = torch.tensor([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
    loads = expert_loads(chosen_LE, 1, steps=9)["router/load_by_expert"]
    assert loads == [[2.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 2.5]]


@pytest.mark.parametrize(
    ("steps", "recorded"),
    [(5, [1, 2, 3, 4, 5]), (250, [1, *range(2, 251, 2)]), (1001, [1, *range(10, 1001, 10), 1001])],
)
def test_loads_are_recorded_about_a_hundred_times_in_a_run(steps: int, recorded: list[int]):
    balanced_LE = torch.ones(1, 2)
    assert [s for s in range(1, steps + 1) if expert_loads(balanced_LE, s, steps=steps)] == recorded


def test_a_line_is_strict_json_whatever_was_measured(tmp_path: Path):
    """NaN and infinity are null, in lists too: a step with a non-finite loss has a line as well."""
    writer = MetricsWriter(tmp_path, [], resumed_step=0)
    bad = [math.nan, 1.0, [math.inf, -math.inf, 2.0]]
    writer.write({"step": 1, "loss/lm": math.nan, "router/entropy_by_layer": bad})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {
        "step": 1, "loss/lm": None, "router/entropy_by_layer": [None, 1.0, [None, None, 2.0]],
    }  # fmt: skip


def remark(folder: Path, resumed_step: int) -> str:
    writer = MetricsWriter(folder, [], resumed_step=resumed_step)
    writer.close()
    return writer.remark


def remove_lines(folder: Path, *steps: int) -> None:
    path = folder / "metrics.jsonl"
    kept = [line for line in lines(folder) if line["step"] not in steps]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


@pytest.mark.parametrize("steps", [range(9), range(4, 9)], ids=["whole", "of-a-copied-checkpoint"])
@pytest.mark.parametrize("resumed_step", [5, 8])
def test_a_whole_file_gets_no_remark(tmp_path: Path, steps: range, resumed_step: int):
    write_steps(tmp_path, steps, resumed_step=0)
    assert remark(tmp_path, resumed_step) == ""
    assert remark(tmp_path, 0) == "", "a new run"


def test_a_file_that_was_removed_is_missed_once(tmp_path: Path):
    assert (
        remark(tmp_path, 8) == "metrics.jsonl begins with step 9: it has no line of a step before"
    )
    write_steps(tmp_path, range(9, 11), resumed_step=8)
    assert remark(tmp_path, 10) == ""


def test_removed_lines_are_missed_up_to_the_resumed_step(tmp_path: Path):
    write_steps(tmp_path, range(13), resumed_step=0)
    remove_lines(tmp_path, 2, 4, 5, 6, 8, 11)
    expected = "metrics.jsonl lacks lines of steps that the run has taken: 2, 4 to 6, 8"
    assert remark(tmp_path, 8) == expected


def test_lines_that_were_copied_into_the_file_are_named(tmp_path: Path):
    write_steps(tmp_path, range(5), resumed_step=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text())
    expected = "metrics.jsonl has several lines of steps 0 to 4; reports show the last ones"
    assert remark(tmp_path, 4) == expected
