"""Fixtures: one run that several tests evaluate, and a harness that starts quickly."""

import sys
from functools import partial
from pathlib import Path

import pytest
from judged import Judged, make_judged

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return make_judged(tmp_path_factory.mktemp("judged"))


@pytest.fixture
def local_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the harness's own tasks: reading 15,000 files takes 20 s at every start."""
    from lm_eval import tasks

    alone = partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", alone)
