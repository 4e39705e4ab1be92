"""The checks of a GPU machine, rehearsed on a CPU, and what becomes of a check that fails."""

import json
import re
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
import torch.multiprocessing as mp
from gpu_checks.profiling import PREFIX, seconds_by_part
from gpu_checks.session import Session
from gpu_checks.table import CHECKS, PREPARE, Check
from gpu_checks.wheels import missing_wheels
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).parents[2]


QUICK = ("placement", "experts", "attention", "loss")
"""Checks that need no run of their own."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Return a scratch folder with the models and tokens of the checks."""
    folder = tmp_path_factory.mktemp("gpu-check")
    rehearse(PREPARE, folder)
    return folder


def rehearse(check: Check, folder: Path) -> list[dict[str, Any]]:
    """Run a check in a fork, which has imported everything, and return its results."""
    session = Session(check.name, folder, rehearse=True)
    target = (check.function, session)
    mp.start_processes(lambda _: gpu_check.run_child(*target), nprocs=1, start_method="fork")
    if not session.results.exists():
        return []
    return [json.loads(line) for line in session.results.read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize("name", QUICK)
def test_a_check_passes_its_rehearsal(inputs: Path, name: str):
    results = rehearse(CHECKS[name], inputs)
    assert results
    assert [line["what"] for line in results if line["verdict"] == "FAIL"] == []
    assert len({line["what"] for line in results}) == len(results)


@pytest.mark.parametrize(
    "names", [["join"], pytest.param([*CHECKS], marks=pytest.mark.slow)], ids=len
)
def test_a_rehearsal_runs_every_check(tmp_path, capfd, names: list[str]):
    out = tmp_path / "new" / "record.json"
    assert gpu_check.main(["--rehearse", "--json", str(out), *names]) == 0
    record = json.loads(out.read_text())
    printed = capfd.readouterr().out
    assert [line["what"] for line in record["results"] if line["verdict"] == "FAIL"] == []
    assert {line["check"] for line in record["results"]} == set(names)
    assert set(record["seconds"]) == {PREPARE.name, *names}
    assert record["machine"]["rehearsal"]
    assert record["machine"]["torch"] == torch.__version__
    assert "The figures that matter" in printed or names == ["join"]
    names = [(line["check"], line["what"]) for line in record["results"]]
    assert len(names) == len(set(names))


def test_a_machine_without_a_gpu_is_asked_to_rehearse(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "visible_gpus", lambda: 0)
    assert gpu_check.main([]) == 2
    assert "torch sees no CUDA device. Use --rehearse" in capsys.readouterr().out


def test_all_limits_fit_into_eight_minutes():
    assert sum(check.limit for check in (PREPARE, *CHECKS.values())) <= 480


CHECK_THAT = """
import os, time
def hangs(session):
    session.add("before", "1", verdict="ok", value=1)
    if os.fork() == 0:  # a rank of the check hangs too
        time.sleep(600)
    time.sleep(600)
def dies(session):
    session.add("before", "1", verdict="ok", value=1)
    print("out of memory")
    os._exit(3)
"""


@pytest.mark.parametrize(
    ("name", "limits", "problem"),
    [("hangs", (1, 4, 16), "not done after "), ("dies", (60,), "ended with status 3")],
)
def test_what_a_check_measured_before_it_failed_is_kept(
    tmp_path, monkeypatch, capsys, name, limits, problem
):
    """A check that hangs is killed; on a busy machine, perhaps before it has measured anything."""
    (tmp_path / "check_that.py").write_text(CHECK_THAT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for limit in limits:
        check = Check(f"{name}-{limit}", f"check_that:{name}", limit, "")
        results = gpu_check.run_check(check, folder=tmp_path, rehearse=True).results
        if len(results) > 1:
            break
    before, failed = results
    assert before["numbers"] == {"value": 1}
    assert failed["verdict"] == "FAIL"
    assert problem in failed["measured"]
    assert name == "hangs" or failed["numbers"]["output"] == ["out of memory"]


def test_a_missed_target_is_no_failure(tmp_path, monkeypatch, capsys):
    session = Session("speed", tmp_path, rehearse=False)
    session.add("MFU", "40%", expected=">= 45%", verdict=session.target(False), figure=True)
    (line,) = [json.loads(line) for line in session.results.read_text().splitlines()]
    assert line["verdict"] == "slow"
    monkeypatch.setattr(gpu_check, "run_checks", lambda *_, **__: {"results": [line]})
    monkeypatch.setattr(gpu_check, "visible_gpus", lambda: 1)
    assert gpu_check.main([]) == 0
    assert "MFU: 40% (target >= 45%): MISSED" in capsys.readouterr().out
    monkeypatch.setattr(
        gpu_check, "run_checks", lambda *_, **__: {"results": [{**line, "verdict": "FAIL"}]}
    )
    assert gpu_check.main([]) == 1


def test_an_unknown_check_is_refused():
    with pytest.raises(SystemExit, match="no such check: sped; known: join"):
        gpu_check.main(["sped", "--rehearse"])


def test_the_backward_pass_counts_for_the_part_whose_forward_pass_it_belongs_to():
    """Three equal products, one forward and two backward, and next to nothing else."""
    x, w = (torch.randn(512, 512, requires_grad=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(PREFIX + "experts"):
            y = x @ w
        (y * 2).sum().backward()
    seconds = seconds_by_part(list(profiler.events() or ()), cuda=False)
    assert seconds["experts"] > 0.6 * sum(seconds.values())  # forward alone: a third
    assert seconds["rest"] > 0
    assert seconds["attention"] == 0


def test_wheels_are_pinned_and_hold_nothing_that_the_machine_has():
    wheels = dict(line.split("==") for line in missing_wheels())
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert {"megatron-core", "pydantic", "rich", "sentencepiece", "typer"} <= set(wheels)
    assert not {"torch", "transformers", "numpy", "pandas", "megatron-moe"} & set(wheels)
    assert wheels["megatron-core"] == pinned["megatron-core"]
