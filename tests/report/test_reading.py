"""Test reading of runs: repeated steps, and missing or damaged files."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic_runs import DOMAINS, analysis
from training_runs import tree

from megatron_moe.checkpoint.folder import Progress, step_folder
from megatron_moe.errors import ConfigError
from megatron_moe.report.evaluation import evaluation
from megatron_moe.report.history import Series, read_history
from megatron_moe.report.read import read_run
from megatron_moe.report.thin import thin


def write_lines(path: Path, *lines: object) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in text))
    return path


def step(number: int, loss: float | None) -> dict:
    return {"step": number, "loss/lm": loss}


def test_a_repeated_step_discards_the_steps_after_it(tmp_path):
    """Steps 2 to 4 were rolled back; step 2 was repeated, and the run is still running."""
    lines = [step(1, 1.0), step(2, 2.0), step(3, 3.0), step(4, 4.0), step(2, 2.5)]
    series = read_history(write_lines(tmp_path / "metrics.jsonl", *lines)).series("loss/lm")
    assert series is not None
    assert dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == {1: 1.0, 2: 2.5}


def test_lines_that_were_put_back_at_the_end_are_in_order(tmp_path):
    lines = [step(1, 1.0), step(3, 3.0), step(4, 4.0), step(2, 2.0)]
    history = read_history(write_lines(tmp_path / "metrics.jsonl", *lines))
    assert [line["loss/lm"] for line in history.lines] == [1.0, 2.0, 3.0, 4.0]


def test_damaged_lines_are_counted_and_null_is_nan(tmp_path):
    path = write_lines(tmp_path / "m", step(1, 1.0), step(2, None), "[3]", '{"step": 3, "loss')
    history = read_history(path)
    assert (history.damaged, history.last_step) == (2, 2)
    series = history.series("loss/lm")
    assert series is not None
    assert np.isnan(series.values[1])


def test_the_mfu_of_version_010_counted_full_attention(tmp_path):
    """A run that was resumed with this version has lines of both kinds."""
    lines = [
        {"step": 1, "throughput/mfu": 0.4},
        {"step": 2, "throughput/mfu": 0.3, "throughput/mfu_full_attention": 0.41},
    ]
    history = read_history(write_lines(tmp_path / "m", *lines))
    causal, full = (history.series(f"throughput/{n}") for n in ("mfu", "mfu_full_attention"))
    assert causal is not None
    assert full is not None
    assert causal.values.tolist() == [0.3]
    assert full.values.tolist() == [0.4, 0.41]


def test_a_value_that_was_never_finite_is_none(tmp_path):
    history = read_history(write_lines(tmp_path / "m", step(1, None)))
    assert history.series("loss/lm") is None
    assert history.series("never logged") is None


def test_a_missing_file_has_no_steps(tmp_path):
    assert read_history(tmp_path / "metrics.jsonl").lines == []


def test_layers_of_another_model_are_left_out(tmp_path):
    lines = [{"step": 1, "by_layer": [1, 2]}, {"step": 2, "by_layer": [3, 4, 5]}]
    series = read_history(write_lines(tmp_path / "m", *lines)).series("by_layer")
    assert series is not None
    assert series.values.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("steps", [1, 199, 200, 201, 1000, 4321])
def test_thinning_keeps_the_mean_the_extremes_and_the_last_step(steps: int):
    values = np.random.default_rng(0).normal(size=(steps, 3))
    thinned = thin(Series(np.arange(1, steps + 1), values))
    assert len(thinned.steps) <= 200
    assert thinned.steps[-1] == steps
    np.testing.assert_array_equal(thinned.high.max(axis=0), values.max(axis=0))
    np.testing.assert_array_equal(thinned.low.min(axis=0), values.min(axis=0))
    if steps % thinned.width == 0:
        np.testing.assert_allclose(thinned.mean.mean(axis=0), values.mean(axis=0))


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder that contains only a configuration."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = tree(folder, tmp_path / "dense", tmp_path / "tokens")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_run_that_has_just_begun_is_read(run):
    files = read_run(run)
    assert (files.receipt, files.spec, files.world_size, files.problems) == (None, None, None, [])
    assert files.history.last_step == 0


@pytest.mark.parametrize(
    ("steps", "checkpoint", "missing"),
    [
        ([0, 1, 2, 3], 2, None),
        ([0, 3, 4, 7], 4, "1 to 2, 5 to 6"),
        ([0, 1, 2], 5, "3 to 5"),
        ([4, 5, 6], 6, None),  # a run that was started from a checkpoint of another one
        ([], 6, None),
    ],
)
def test_steps_without_a_line_are_named(
    run: Path, steps: list[int], checkpoint: int, missing: str | None
):
    write_lines(run / "metrics.jsonl", *(step(number, 1.0) for number in steps))
    write_checkpoint(run, checkpoint)
    problems = read_run(run).problems
    line = f"metrics.jsonl lacks lines of steps that the run has taken: {missing}"
    assert problems == ([] if missing is None else [line])


def write_checkpoint(run: Path, number: int, *, name: int | None = None) -> None:
    folder = step_folder(run, number if name is None else name)
    folder.mkdir(parents=True)
    progress = Progress(
        step=number, samples=0, tokens=0, plan_hash="", optimizer_updates=0, world_size=2,
        precision="fp32", blend={},
    )  # fmt: skip
    (folder / "checkpoint.json").write_text(json.dumps(asdict(progress)))
    (folder.parent / "latest").write_text(f"{folder.name}\n")


def test_results_of_steps_that_the_run_went_back_from_are_named(run: Path):
    (run / "analysis").mkdir()
    for number in (4, 8, 12):
        record = analysis(np.random.default_rng(0), number, layers=2, experts=4)
        (run / "analysis" / f"step-{number:06d}.json").write_text(json.dumps(record))
    write_lines(run / "metrics.jsonl", *(step(number, 1.0) for number in range(6)))
    (problem,) = read_run(run).problems
    assert "results of steps 8, 12, but the run is at step 5" in problem


def test_a_folder_in_the_place_of_the_receipt_is_listed(run: Path):
    (run / "receipt.json").mkdir()
    assert read_run(run).problems == ["receipt.json is not shown: it is damaged"]


def test_a_renamed_checkpoint_is_listed_and_not_used(run: Path):
    write_checkpoint(run, 4, name=8)
    files = read_run(run)
    assert files.world_size is None
    assert "its checkpoint.json is of step 4" in files.problems[0]


def test_damaged_files_are_reported_and_the_rest_is_read(run):
    (run / "receipt.json").write_text("{")
    (run / "analysis").mkdir()
    (run / "analysis" / "step-00000005.json").write_text('{"kind": "analysis", "step": 5}')
    (run / "evaluation").mkdir()
    (run / "evaluation" / "step-00000005.json").write_text("no JSON")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000005\n")
    write_lines(run / "metrics.jsonl", step(1, 1.0), "{")
    files = read_run(run)
    problems = "\n".join(files.problems)
    for what in (
        "receipt.json",
        "analysis/step-00000005.json is not shown: checkpoint: Field required",
        "evaluation/step-00000005.json",
        "latest names step_00000005",
        "1 damaged",
    ):
        assert what in problems
    assert files.history.last_step == 1


def test_an_analysis_with_inconsistent_shapes_is_reported(run):
    record = analysis(np.random.default_rng(0), 5, 2, 4)
    record["counts"][DOMAINS[0]] = [[1, 2, 3, 4]]
    (run / "analysis").mkdir()
    (run / "analysis" / "step-000005.json").write_text(json.dumps(record))
    files = read_run(run)
    assert files.analyses == []
    assert "counts of 'commoncrawl' are not 2 layers x 4 experts" in files.problems[0]


def test_scores_of_tasks_are_read_and_shown(run):
    score = {"task": "my_<task>", "examples": None, "metric": "acc", "value": 0.625, "stderr": None}
    record = {"schema": 1, "kind": "tasks", "model": "x", "step": 5, "tasks": ["a"]}
    (run / "evaluation").mkdir()
    path = run / "evaluation" / "tasks-a-step-000005.json"
    path.write_text(json.dumps({**record, "scores": [score], "harness": []}))
    files = read_run(run)
    assert files.problems == []
    page = evaluation(files).html()
    assert "my_&lt;task&gt;" in page
    assert "<td>0.625</td>" in page


def test_a_folder_that_is_not_a_run_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config.yaml"):
        read_run(tmp_path)
