"""Run the command of lm-evaluation-harness on an exported model, in this process.

The harness itself parses the options that this package does not define. Tasks with different
numbers of few-shot examples need separate runs, because the harness accepts one number for all.
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
from megatron_moe.hf.load import silence_progress_bars

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Exported:
    """A Hugging Face folder and its source."""

    folder: Path
    source: Path
    """The checkpoint, or the given folder."""
    step: int | None
    """Step of the checkpoint; None if a folder was given."""
    results: Path
    """Folder for evaluation results, in the run directory or in the given folder."""


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """Tasks for one run of the harness."""

    tasks: tuple[str, ...]
    examples: int | None
    """Few-shot examples before each question; None uses ``--num_fewshot`` or the task's default."""


def plan_runs(names: Sequence[str]) -> list[HarnessRun]:
    """Group tasks and suites into runs of the harness, one for each number of examples.

    >>> plan_runs(["piqa", "my_task"])
    [HarnessRun(tasks=('piqa', 'my_task'), examples=None)]
    >>> [(run.examples, len(run.tasks)) for run in plan_runs(["llama3-moe"])]
    [(0, 7), (5, 1)]
    """
    by_examples: dict[int | None, list[str]] = {}
    for name in names:
        for task, examples in SUITES.get(name, ((name, None),)):
            by_examples.setdefault(examples, []).append(task)
    return [HarnessRun(tuple(tasks), examples) for examples, tasks in by_examples.items()]


def run_tasks(model: Exported, names: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Run tasks and suites on a model.

    Args:
        model: A folder that transformers can load.
        names: Names of tasks, task groups, and `SUITES`.
        options: Options for the harness.

    Returns:
        The content of the results file: scores, and the harness's own results.

    Raises:
        ConfigError: The harness is not installed, does not know an option or a task, or cannot get
            the data of a task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks requires lm-evaluation-harness, which is not installed.\n"
            "  pip install 'megatron-moe[eval]'"
        )
    silence_progress_bars()
    # Parse the arguments of all runs before the first run starts.
    commands = [_command(model.folder, run, options) for run in plan_runs(names)]
    results = [_results(arguments) for arguments in commands]
    return {
        "schema": SCHEMA,
        "kind": "tasks",
        "model": str(model.source),
        "step": model.step,
        "tasks": list(names),
        "scores": [score for result in results for score in _scores(result)],
        "harness": results,
    }


def _command(folder: Path, run: HarnessRun, options: Sequence[str]) -> argparse.Namespace:
    """Parse the harness's arguments for one run."""
    from lm_eval._cli.run import Run

    words = ["run", "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", *run.tasks]
    if not torch.cuda.is_available():
        words += ["--device", "cpu"]
    parser = argparse.ArgumentParser(prog="lm-eval")
    Run.create(parser.add_subparsers())
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            arguments = parser.parse_args([*words, *options])
    except SystemExit as error:
        reason = stderr.getvalue().strip().splitlines()[-1:] or ["see its output above"]
        raise ConfigError(
            f"the harness does not accept {' '.join(options)}: {reason[0]}\n"
            "  run lm-eval run --help to list its options"
        ) from error
    if run.examples is not None:
        if arguments.num_fewshot is not None:
            raise ConfigError(
                f"--num_fewshot ({arguments.num_fewshot}) cannot be used with a suite, which "
                "defines the number of examples of each task.\n"
                "  list the tasks instead of the suite, or remove --num_fewshot"
            )
        arguments.num_fewshot = run.examples
    return arguments


def _results(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the harness and return the content of the file it writes."""
    with tempfile.TemporaryDirectory(prefix="megatron-moe-") as name:
        folder = Path(arguments.output_path or name)
        arguments.output_path = str(folder)
        here = folder.parent if folder.suffix == ".json" else folder
        before = set(here.rglob("*.json"))
        with _readable_errors(arguments), contextlib.redirect_stdout(sys.stderr):
            arguments.func(arguments)
        (written,) = [p for p in here.rglob("*.json") if p not in before]
        return json.loads(written.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _readable_errors(arguments: argparse.Namespace) -> Iterator[None]:
    """Convert the harness's errors that users can fix to `ConfigError`."""
    tasks = ", ".join(arguments.tasks)
    try:
        yield
    except Exception as error:
        if lost := next(filter(_is_unreachable, _chain(error)), None):
            reason = " ".join(str(lost).split()) or type(lost).__name__
            raise ConfigError(
                f"cannot download the data of {tasks}, because its hub cannot be reached: "
                f"{reason}\n"
                "  run lm-eval once on a machine with network access, and copy its HF_HOME here;\n"
                "  or use a local task: --include_path DIR with its YAML and JSONL files "
                "(docs/evaluation.md)"
            ) from error
        if str(error).startswith(("Tasks not found", "Specify", "When", "If --samples")):
            raise ConfigError(
                f"the harness rejects --tasks {tasks}: {error}\n"
                "  run lm-eval ls tasks to list its tasks; --include_path DIR adds local tasks"
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
    # The hub's client can be requests or httpx; both use these names for connection errors.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, *of_the_hub)) or not names.isdisjoint(
        ("TransportError", "ConnectionError", "Timeout")
    )


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of one run of the harness as a flat list of scores."""
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


def results_path(model: Exported, names: Sequence[str]) -> Path:
    """Return the path of the results file for these tasks and suites."""
    joined = "+".join(names).replace(os.sep, "-")[:80]
    step = "" if model.step is None else f"-step-{model.step:06d}"
    return model.results / f"tasks-{joined}{step}.json"


def tasks_report(record: dict[str, Any]) -> Table:
    """Format the scores as a table."""
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
