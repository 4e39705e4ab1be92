"""Test that the page follows from its numbers, and that jobs run once, after what they need."""

import json
from functools import partial
from pathlib import Path

import pytest

from megatron_moe.errors import UserError
from research.study import page as study_page
from research.study.cases import AT_STEP_0, TRAINED, Case
from research.study.jobs import Job, do_all
from research.study.page import QUESTIONS, START, differences, page, spread, to_json, verdict
from research.study.plot import PANELS, plots

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {case.name for case in TRAINED}


def run(case: str, seed: int, *losses: float) -> dict:
    return {
        "case": case, "shape": "parts", "seed": seed, "seconds": 60.0,
        "validation": [[step, loss] for step, loss in zip((0, 20, 40), losses, strict=True)],
        "training": [5.0 - 0.1 * step for step in range(8)],
    }  # fmt: skip


NUMBERS = {
    "date": "2026-01-01", "commit": "abc", "cores": 2, "versions": {"torch": "1"},
    "held_out_tokens": 7168, "dense": {"validation": [[0, 7.6], [1000, 4.5]]},
    "trained": [
        *(run("split_random, N/K", seed, 6.0 + seed, 5.0, 4.0) for seed in range(3)),
        *(run("split_random, none", seed, 6.5 + seed, 5.0, 4.0 - 0.1 * seed) for seed in range(3)),
    ],
    "step0": [{"case": "dense", "loss": 3.5, "tokens": 3584, "seconds": 1.0},
              {"case": "split_random, N", "loss": 9.25, "tokens": 3584, "seconds": 1.0},
              {"case": "split_random, calibrated", "loss": 8.0, "tokens": 3584, "seconds": 1.0},
              {"case": "drop, none", "loss": 4.0, "tokens": 3584, "seconds": 1.0}],
}  # fmt: skip


def test_the_page_is_of_these_numbers():
    numbers = json.loads((DOCS / "study.json").read_text())
    assert (DOCS / "study.md").read_text() == page(numbers)
    assert (DOCS / "study.svg").read_text() == plots(numbers)


def test_json_is_written_as_it_was_read():
    text = (DOCS / "study.json").read_text()
    assert to_json(json.loads(text)) == text


def test_seeds_are_compared_one_by_one():
    first = next(question for question in QUESTIONS if question.at == START)
    assert differences(NUMBERS, first) == [-0.5, -0.5, -0.5]
    in_the_end = QUESTIONS[1]
    assert differences(NUMBERS, in_the_end) == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("actual", "said"),
    [
        ([-0.1, -0.2, -0.3], "confirmed"),
        ([0.1, 0.2, 0.3], "reversed"),
        ([0.1, -0.2, 0.3], "undecided: seeds disagree"),
        ([-0.1, -0.2], "too few seeds"),
        ([], "not run"),
    ],
)
def test_a_verdict_needs_seeds_that_agree(actual, said: str):
    assert verdict(actual) == said


def test_a_spread_is_mean_smallest_and_largest():
    assert spread([1.0, 2.0, 4.5]) == "2.500 (1.000 to 4.500)"
    assert spread([-0.5], sign=True) == "-0.500"


def test_cases_that_were_not_run_are_reported():
    text = page(NUMBERS)
    assert "| split_random, N/K | F / 4 | 3 | 7.000 (6.000 to 8.000) | 5.000 | 4.000 |" in text
    assert "| split_random | - | - | 9.250 | 8.000 |" in text
    assert "| drop, none | 4.000 | +0.500 |" in text
    assert "| copy | dense | - (end) | not run |" in text


def test_a_curve_is_the_mean_of_its_windows():
    assert ">split_random, none: 4.600</text>" in plots(NUMBERS)
    assert plots(NUMBERS).count("<polyline") == 2 + 1 + 1  # none, N/K in three panels


def test_questions_and_panels_name_cases():
    named = {q.better for q in QUESTIONS} | {q.worse for q in QUESTIONS}
    assert named | {case for _, cases in PANELS for case in cases} <= NAMES
    assert len({case.file_name for case in TRAINED}) == len(TRAINED)
    assert len({case.file_name for case in AT_STEP_0}) == len(AT_STEP_0)


@pytest.mark.parametrize("case", [c for c in TRAINED if c.start == "trained"], ids=lambda c: c.name)
def test_a_shape_costs_what_it_says(case: Case):
    moe, dense = case.moe(512), 512
    passed = moe["moe_router_topk"] * moe.get("moe_ffn_hidden_size", dense)
    passed += moe.get("moe_shared_expert_intermediate_size", 0)
    factor = {"dense": 1, "whole": 2, "half": 1, "parts": 1 / 4, "shared": 7 / 16}[case.shape]
    assert passed == factor * dense


def work(path: Path, needs: list[Path], order: Path) -> None:
    assert all(need.exists() for need in needs)
    with order.open("a") as file:
        file.write(path.name + "\n")
    path.write_text("done")


def jobs(folder: Path, needs: dict[str, list[str]]) -> list[Job]:
    actual = []
    for name, needed in needs.items():
        paths = [folder / other for other in needed]
        doing = partial(work, folder / name, paths, folder / "order")
        actual.append(Job(name, folder / name, doing, needs=tuple(paths)))
    return actual


def test_jobs_wait_for_what_they_need_and_are_done_once(tmp_path: Path):
    needs = {"c": ["a", "b"], "a": [], "b": ["a"]}
    for _ in range(2):
        do_all(jobs(tmp_path, needs), workers=2, logs=tmp_path / "logs")
    assert (tmp_path / "order").read_text() == "a\nb\nc\n"


def test_a_failed_job_is_named_and_the_others_continue(tmp_path: Path):
    broken = Job("broken", tmp_path / "broken", partial(int, "no number"))
    after = Job("after", tmp_path / "after", partial(int, "1"), needs=(broken.result,))
    with pytest.raises(UserError, match=r"1 jobs of the study failed; .*broken\.log"):
        do_all([broken, after, *jobs(tmp_path, {"a": []})], workers=2, logs=tmp_path / "logs")
    assert (tmp_path / "a").exists()
    assert "invalid literal" in (tmp_path / "logs" / "broken.log").read_text()


def test_nothing_starts_when_time_is_up(tmp_path: Path):
    do_all(jobs(tmp_path, {"a": []}), workers=1, logs=tmp_path / "logs", until=0.0)
    assert not (tmp_path / "a").exists()


def test_no_results_no_page(tmp_path: Path):
    with pytest.raises(UserError, match="run make study"):
        study_page.gathered(tmp_path, held_out_tokens=1)
