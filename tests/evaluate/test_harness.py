"""`evaluate --tasks`: compare the harness on a local task with log-likelihoods by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from judged import STDLIB, Judged
from local_task import (
    Question,
    likelihoods,
    logged_likelihoods,
    questions_of,
    scores_by_hand,
    write_task,
)
from typer.testing import CliRunner

from megatron_moe.cli.main import app
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.errors import ConfigError
from megatron_moe.evaluate.suites import SUITES

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("local_tasks_alone")]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    text = " ".join((STDLIB / "LICENSE.txt").read_text().split())
    return questions_of([f"{s}." for s in text.split(". ") if 8 < len(s.split()) < 20], count=8)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def refused(*words: object) -> str:
    error = run(*words).exception
    assert isinstance(error, ConfigError), error
    return str(error)


def test_a_checkpoint_scores_as_by_hand(judged: Judged, questions: list[Question], tmp_path: Path):
    tasks = write_task(tmp_path / "tasks", questions)
    logged = tmp_path / "logged"
    options = ["--include_path", tasks, "--log_samples", "--output_path", logged]
    result = run(judged.run, "--tasks", "goes_on", *options)
    assert result.exception is None, result.exception

    export_checkpoint(judged.run, tmp_path / "hf")
    by_hand = likelihoods(tmp_path / "hf", questions)
    for score, expected in zip(logged_likelihoods(logged), by_hand, strict=True):
        assert score == pytest.approx(expected, rel=1e-5)  # fp32, in batches of another shape
    record = json.loads((judged.run / "evaluation" / "tasks-goes_on-step-000002.json").read_text())
    assert record["step"] == 2
    scores = {score["metric"]: score["value"] for score in record["scores"]}
    assert scores == scores_by_hand(questions, by_hand)
    assert "goes_on" in result.stdout


def test_a_task_of_a_hub_that_is_not_there(
    judged: Judged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    tasks = write_task(tmp_path / "tasks", [])
    text = (tasks / "goes_on.yaml").read_text().replace("path: json", "path: allenai/sciq")
    (tasks / "goes_on.yaml").write_text(text)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(judged.dense, "--tasks", "goes_on", "--include_path", tasks)
    assert message.startswith("cannot download the data of goes_on, because its hub cannot be ")
    assert "--include_path DIR" in message


def test_what_the_harness_refuses_is_said(judged: Judged):
    assert "does not accept --limits 3: " in refused(
        judged.dense, "--tasks", "sciq", "--limits", "3"
    )
    assert "Tasks not found: no_such_task" in refused(judged.dense, "--tasks", "no_such_task")
    assert "--num_fewshot (1) cannot be used with a suite" in refused(
        judged.dense, "--tasks", "llama-moe", "--num_fewshot", "1"
    )
    assert "--ranks cannot be combined with --tasks" in refused(
        judged.dense, "--tasks", "sciq", "--ranks", 2
    )
    assert "options require --tasks" in refused(judged.run, "--limit", "2")


def test_suites_name_tasks_that_the_harness_has():
    from lm_eval import tasks

    known = Path(tasks.__file__).parent
    folders = "sciq piqa winogrande arc hellaswag logiqa super_glue lambada nq_open mmlu truthfulqa"
    paths = [str(known / folder) for folder in [*folders.split(), "openbookqa"]]
    names = set(tasks.TaskManager(include_path=paths).all_tasks)
    assert {task for suite in SUITES.values() for task, _ in suite} <= names
