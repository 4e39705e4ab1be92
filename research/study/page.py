"""Write docs/study.json from the results of the runs, and docs/study.md from docs/study.json.

All figures and verdicts of the page are computed from the JSON. A difference counts if all seeds
agree on its sign, and is shown with its minimum and maximum over the seeds. Two cases are compared
seed by seed: the same seed means the same text in the same order.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_moe.errors import UserError
from megatron_moe.markdown import markdown_table
from research.study.cases import AT_STEP_0, TRAINED
from research.study.plot import plots

Numbers = dict[str, Any]
Row = list[str]
START, HALF, END = 0, 1, 2
"""Indices into a run's held-out losses."""


@dataclass(frozen=True, slots=True)
class Question:
    """A claim of a paper, and the two cases that test it."""

    text: str
    claim: str
    better: str
    worse: str
    at: int


QUESTIONS = (
    Question("Does N/K help a split at the start?", "LLaMA-MoE, fig. 3a",
             "split_random, N/K", "split_random, none", START),
    Question("and at the end?", "LLaMA-MoE, fig. 3a",
             "split_random, N/K", "split_random, none", END),
    Question("Is a measured factor better than N/K at the start?", "ours",
             "split_random, calibrated", "split_random, N/K", START),
    Question("and at the end?", "ours",
             "split_random, calibrated", "split_random, N/K", END),
    Question("Is N/K better than N at the end?", "LLaMA-MoE takes N/K",
             "split_random, N/K", "split_random, N", END),
    Question("Is a random split better than clusters?", "LLaMA-MoE, fig. 3b",
             "split_random, N/K", "split_clustered, N/K", END),
    Question("and than experts that share neurons?", "LLaMA-MoE, fig. 3b",
             "split_random, N/K", "sharing_inner, N/K", END),
    Question("With a shared expert, is random better than by importance?", "LLaMA-MoE, fig. 3b",
             "split_random with shared, N/K", "sharing_inter, N/K", END),
    Question("Are a shared expert's neurons better chosen by activation?", "ExpertWeaver",
             "weaver, N/K", "split_random with shared, N/K", END),
    Question("Is a split better than the same MoE from scratch?", "LLaMA-MoE, fig. 3d",
             "split_random, N/K", "from scratch, parts", END),
    Question("Are copies better than the same MoE from scratch?", "Sparse Upcycling",
             "copy", "from scratch, whole", END),
    Question("Are copies better than continuing the dense model?", "Sparse Upcycling",
             "copy", "dense", END),
    Question("Is topk_softmax better for copies?", "Llama 3 Meets MoE",
             "copy", "copy, softmax_topk", END),
    Question("Is softmax_topk, scaled, better for virtual groups?", "arXiv 2410.07524",
             "granular, softmax_topk", "granular", END),
    Question("Does it help to reinitialize half of the copies' neurons?", "Drop-Upcycling",
             "drop", "copy", END),
    Question("Are branches better than copies?", "Branch-Train-MiX",
             "mix", "copy", END),
)  # fmt: skip


def gathered(results: Path, *, held_out_tokens: int) -> Numbers:
    """Collect the results of the runs, in the order of the cases.

    Args:
        results: Folder of the runs' results.
        held_out_tokens: Number of tokens on which a trained model is evaluated.

    Raises:
        UserError: There are no results.
    """
    trained = [json.loads(path.read_text()) for path in (results / "trained").glob("*.json")]
    at_step_0 = [json.loads(path.read_text()) for path in (results / "step0").glob("*.json")]
    if not trained or not at_step_0:
        raise UserError(f"{results} contains no results yet.\n  run make study")
    first = [case.name for case in TRAINED]
    second = [case.name for case in AT_STEP_0]
    return {
        **provenance(),
        "held_out_tokens": held_out_tokens,
        "dense": json.loads((results / "dense.json").read_text()),
        "trained": sorted(trained, key=lambda run: (first.index(run["case"]), run["seed"])),
        "step0": sorted(at_step_0, key=lambda result: second.index(result["case"])),
    }


def provenance() -> Numbers:
    """Return when, where and with which versions results are collected."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip()


def write_pages(numbers: Numbers, out: Path) -> None:
    """Write study.json, study.md and the plots to ``out``."""
    (out / "study.json").write_text(to_json(numbers))
    (out / "study.md").write_text(page(numbers))
    (out / "study.svg").write_text(plots(numbers))


def to_json(numbers: Numbers) -> str:
    """Format the numbers with one line per run, so that a diff shows which run changed."""
    parts = []
    for key, value in numbers.items():
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(run) for run in value)
            parts.append(f'"{key}": [\n  {lines}\n ]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def page(numbers: Numbers) -> str:
    """Return the text of docs/study.md."""
    template = (Path(__file__).parent / "page.md").read_text()
    dense = numbers["dense"]["validation"]
    trained, seeds = numbers["trained"], {run["seed"] for run in numbers["trained"]}
    versions = numbers["versions"]
    return template.format(
        date=numbers["date"],
        commit=numbers["commit"],
        cores=numbers["cores"],
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        dense_tokens=f"{dense[-1][0]:,}",
        dense_start=f"{dense[0][1]:.2f}",
        dense_end=f"{dense[-1][1]:.2f}",
        run_tokens=f"{trained[0]['validation'][-1][0]:,}",
        held_out_tokens=f"{numbers['held_out_tokens']:,}",
        runs=len(trained),
        seeds=len(seeds),
        hours=f"{sum(run['seconds'] for run in trained + numbers['step0']) / 3600:.1f}",
        probe_tokens=f"{numbers['step0'][0]['tokens']:,}",
        verdicts=markdown_table(
            ["question", "claimed by", "A", "B", "A - B, nats", "here"], _verdicts(numbers)
        ),
        trained=markdown_table(
            ["case", "a token passes", "seeds", "step 0", "halfway", "end"],
            _trained_rows(numbers),
        ),
        rescales=markdown_table(
            ["SmolLM2-135M", "none", "N/K", "N", "calibrated"], _rescales(numbers)
        ),
        others=markdown_table(
            ["SmolLM2-135M", "loss", "above the dense model's"], _others(numbers)
        ),
    )


def of_case(numbers: Numbers, case: str) -> dict[int, list[float]]:
    """Return the held-out losses at start, half way and end, by seed."""
    return {
        run["seed"]: [loss for _, loss in run["validation"]]
        for run in numbers["trained"]
        if run["case"] == case
    }


def differences(numbers: Numbers, question: Question) -> list[float]:
    """Return the loss of ``better`` minus that of ``worse`` for each seed that both have."""
    first, second = of_case(numbers, question.better), of_case(numbers, question.worse)
    at = question.at
    return [first[seed][at] - second[seed][at] for seed in sorted(first.keys() & second.keys())]


def verdict(values: list[float]) -> str:
    """Return whether the seeds confirm the claim that the differences are below zero."""
    if not values:
        return "not run"
    if len(values) < 3:
        return "too few seeds"
    if max(values) < 0:
        return "confirmed"
    return "reversed" if min(values) > 0 else "undecided: seeds disagree"


def _verdicts(numbers: Numbers) -> Iterator[Row]:
    when = {START: "step 0", END: "end"}
    for question in QUESTIONS:
        values = differences(numbers, question)
        yield [
            question.text, question.claim, question.better, question.worse,
            f"{spread(values, sign=True)} ({when[question.at]})", verdict(values),
        ]  # fmt: skip


_PASSES = {"dense": "F", "whole": "2 F", "half": "F", "parts": "F / 4", "shared": "7 F / 16"}


def _trained_rows(numbers: Numbers) -> Iterator[Row]:
    for case in TRAINED:
        if losses := list(of_case(numbers, case.name).values()):
            columns = [spread([run[index] for run in losses]) for index in (START, HALF, END)]
            yield [case.name, _PASSES[case.shape], str(len(losses)), *columns]


def spread(values: list[float], *, sign: bool = False) -> str:
    """Format the mean, minimum and maximum."""
    if not values:
        return "-"
    form = "{:+.3f}" if sign else "{:.3f}"
    low, middle, high = (form.format(value) for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


_RESCALES = ("none", "N/K", "N", "calibrated")


def _rescales(numbers: Numbers) -> Iterator[Row]:
    losses = {result["case"]: result["loss"] for result in numbers["step0"]}
    names = [case.name.rpartition(", ")[0] for case in AT_STEP_0 if case.measured]
    for name in dict.fromkeys(["split_random", "split_clustered", *names]):
        row = [losses.get(f"{name}, {rescale}") for rescale in _RESCALES]
        if any(row):
            yield [name, *("-" if loss is None else f"{loss:.3f}" for loss in row)]


def _others(numbers: Numbers) -> Iterator[Row]:
    losses = {result["case"]: result["loss"] for result in numbers["step0"]}
    for case in AT_STEP_0:
        if case.shape not in ("parts", "shared") and case.name in losses:
            loss = losses[case.name]
            yield [case.name, f"{loss:.3f}", f"{loss - losses['dense']:+.3f}"]
