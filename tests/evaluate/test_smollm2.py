"""The harness on real weights gives the scores by hand, for the dense model and its copies."""

import json
from pathlib import Path
from typing import Any

import pytest
from get_dense import get_dense
from judged import STDLIB
from local_task import (
    likelihoods,
    logged_likelihoods,
    questions_of,
    scores_by_hand,
    write_task,
)
from package_index import default_cache
from training_runs import run_training, tree
from typer.testing import CliRunner

from megatron_moe.cli.main import app

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.distributed]
QUESTIONS = 8


def scored(source: Path, tasks: Path, logged: Path, results: Path) -> Any:
    """Return scores and log-likelihoods of a model."""
    options = ["--include_path", tasks, "--log_samples", "--output_path", logged]
    words = ["evaluate", source, "--tasks", "goes_on", *options]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exception is None, result.exception
    record = json.loads(next(results.glob("tasks-goes_on*.json")).read_text())
    return {s["metric"]: s["value"] for s in record["scores"]}, logged_likelihoods(logged)


@pytest.mark.usefixtures("local_tasks_alone")
def test_the_dense_model_and_its_copies_score_as_by_hand(tmp_path: Path):
    dense, run = tmp_path / "smollm2", tmp_path / "run"
    get_dense(dense, source=None, cache=default_cache())
    text = " ".join((STDLIB / "LICENSE.txt").read_text().split())
    sentences = [f"{s}." for s in text.split(". ") if 8 < len(s.split()) < 20]
    questions = questions_of(sentences, count=QUESTIONS)
    tasks = write_task(tmp_path / "tasks", questions)
    settings = tree(
        run, dense, STDLIB / "LICENSE.txt", moe={"num_moe_experts": 2},
        data={"path": str(tmp_path / "text.txt"), "seq_length": 32},
        train={"steps": 0, "global_batch_size": 1, "precision": "fp32"},
    )  # fmt: skip
    (tmp_path / "text.txt").write_text(text)
    run_training(settings, world_size=1)

    by_hand = likelihoods(dense, questions)
    expected = scores_by_hand(questions, by_hand)
    print(f"scores {expected} of {len(questions)} questions; chance is 0.25")
    assert expected["acc"] > 0.5, "no better than chance: any order of the choices would pass"
    for source, results in ((dense, dense / "evaluation"), (run, run / "evaluation")):
        scores, logged = scored(source, tasks, tmp_path / f"logged-{source.name}", results)
        assert scores == expected, source
        for score, reference in zip(logged, by_hand, strict=True):
            # fp32 sums of about ten logs, from matmuls of other shapes; choices are 0.4 apart.
            assert score == pytest.approx(reference, abs=2e-3)
