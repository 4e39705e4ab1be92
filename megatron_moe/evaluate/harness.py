"""lm-evaluation-harness on an exported model: its own command, in this process.

Options that are not ours are parsed by the harness itself. Tasks of different numbers of examples
are runs of their own, because the harness takes one number for all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megatron_moe.errors import ConfigError
from megatron_moe.evaluate.suites import SUITES

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Exported:
    """A Hugging Face folder and where it comes from."""

    folder: Path
    source: Path
    """The checkpoint; the folder itself where it was given."""
    step: int | None
    """Of the checkpoint; None where a folder was given."""
    results: Path
    """Folder for what is found out about it: beside the run, or in the given folder."""


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the harness."""

    tasks: tuple[str, ...]
    examples: int | None
    """Before each question; None: as ``--num_fewshot`` or the task itself says."""


def rounds_of(wanted: Sequence[str]) -> list[Round]:
    """The runs that tasks and suites need: one for each number of examples.

    >>> rounds_of(["piqa", "my_task"])
    [Round(tasks=('piqa', 'my_task'), examples=None)]
    >>> [(one.examples, len(one.tasks)) for one in rounds_of(["llama3-moe"])]
    [(0, 7), (5, 1)]
    """
    by_examples: dict[int | None, list[str]] = {}
    for name in wanted:
        for task, examples in SUITES.get(name, ((name, None),)):
            by_examples.setdefault(examples, []).append(task)
    return [Round(tuple(tasks), examples) for examples, tasks in by_examples.items()]


def run_tasks(model: Exported, wanted: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Run tasks and suites on a model.

    Args:
        model: A folder that transformers loads.
        wanted: Names of tasks, of groups of them, and of `SUITES`.
        options: For the harness.

    Returns:
        What the file holds: scores, and the harness's own results.

    Raises:
        ConfigError: The harness is not installed, does not know an option or a task, or cannot get
            a task's data.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed.\n"
            "  pip install 'megatron-moe[eval]'"
        )
    rounds = rounds_of(wanted)
    commands = [
        _command(model.folder, one, options) for one in rounds
    ]  # all are legal, or none runs
    results = [_results(arguments) for arguments in commands]
    return {
        "schema": SCHEMA,
        "kind": "tasks",
        "model": str(model.source),
        "step": model.step,
        "tasks": list(wanted),
        "scores": [score for result in results for score in _scores(result)],
        "harness": results,
    }


def _command(folder: Path, one: Round, options: Sequence[str]) -> argparse.Namespace:
    """The harness's arguments of one run."""
    from lm_eval._cli.run import Run

    words = ["run", "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", *one.tasks]
    if not torch.cuda.is_available():
        words += ["--device", "cpu"]
    parser = argparse.ArgumentParser(prog="lm-eval")
    Run.create(parser.add_subparsers())
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            found = parser.parse_args([*words, *options])
    except SystemExit as error:
        reason = told.getvalue().strip().splitlines()[-1:] or ["it has printed why"]
        raise ConfigError(
            f"the harness does not take {' '.join(options)}: {reason[0]}\n"
            "  lm-eval run --help lists its options"
        ) from error
    if one.examples is not None:
        if found.num_fewshot is not None:
            raise ConfigError(
                f"--num_fewshot ({found.num_fewshot}) is for tasks; a suite brings its own numbers "
                "of examples.\n  name the tasks instead of the suite, or leave it away"
            )
        found.num_fewshot = one.examples
    return found


def _results(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the harness and read the file it writes."""
    with tempfile.TemporaryDirectory(prefix="megatron-moe-") as name:
        folder = Path(arguments.output_path or name)
        arguments.output_path = str(folder)
        here = folder.parent if folder.suffix == ".json" else folder
        before = set(here.rglob("*.json"))
        with _told_plainly(arguments), contextlib.redirect_stdout(sys.stderr):
            arguments.func(arguments)
        (written,) = [p for p in here.rglob("*.json") if p not in before]
        return json.loads(written.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _told_plainly(arguments: argparse.Namespace) -> Iterator[None]:
    """Errors of the harness that a user can do something about, as such."""
    tasks = ", ".join(arguments.tasks)
    try:
        yield
    except Exception as error:
        if lost := next(filter(_is_unreachable, _chain(error)), None):
            reason = " ".join(str(lost).split()) or type(lost).__name__
            raise ConfigError(
                f"the data of {tasks} is on a hub that cannot be reached: {reason}\n"
                "  where there is a network, load it once (lm-eval does) and bring HF_HOME here;\n"
                "  or use a local task: --include_path DIR with its YAML and JSONL "
                "(docs/evaluation.md)"
            ) from error
        if str(error).startswith(("Tasks not found", "Specify", "When", "If --samples")):
            raise ConfigError(
                f"the harness refuses --tasks {tasks}: {error}\n"
                "  lm-eval ls tasks lists what it has; --include_path DIR brings local tasks"
            ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_unreachable(error: BaseException) -> bool:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    of_the_hub = (
        DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    )  # fmt: skip
    # The hub's client is one of several: requests, httpx. All name a lost connection alike.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, *of_the_hub)) or not names.isdisjoint(
        ("TransportError", "ConnectionError", "Timeout")
    )


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of a run of the harness, one after the other."""
    scores = []
    for task, figures in result["results"].items():
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            scores.append(
                {
                    "task": task,
                    "examples": result["n-shot"].get(task),
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": value,
                    "stderr": error if isinstance(error, float) else None,
                }
            )
    return scores


def file_of(model: Exported, wanted: Sequence[str]) -> Path:
    """Where the results of ``wanted`` lie."""
    names = "+".join(wanted).replace(os.sep, "-")[:80]
    step = "" if model.step is None else f"-step-{model.step:06d}"
    return model.results / f"tasks-{names}{step}.json"


def tasks_report(record: dict[str, Any]) -> Table:
    """The scores as a table."""
    table = Table("task", "examples", "metric", "value", "stderr", title=record["model"])
    for column in table.columns[3:]:
        column.justify = "right"
    for score in record["scores"]:
        error = score["stderr"]
        table.add_row(
            score["task"],
            "" if score["examples"] is None else str(score["examples"]),
            score["metric"],
            f"{score['value']:.4f}" if isinstance(score["value"], float) else str(score["value"]),
            "" if error is None else f"{error:.4f}",
        )
    return table
