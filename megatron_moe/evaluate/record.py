"""What an evaluation holds: its file in run.dir/evaluation, and its table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SCHEMA = 1
Figures = dict[str, Any]
"""tokens, bytes, loss (nats per token), perplexity and bits_per_byte of one model on one text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Losses on held-out text, by domain, of a run's model at three times."""

    checkpoint: str
    step: int
    seq_length: int
    domains: dict[str, Figures]
    """Of the checkpoint."""
    dense: dict[str, Figures] | None
    """Of the model the run started from; None where its weights are not at hand."""
    step_0: dict[str, Figures] | None
    """Of the MoE before its first step."""
    remarks: tuple[str, ...] = ()
    """Why something is not there."""

    def to_json(self) -> dict[str, Any]:
        """The object that the file holds."""
        return {"schema": SCHEMA, "kind": "evaluation", **asdict(self)}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record``: complete under its name, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(path)


def evaluation_report(evaluation: Evaluation) -> RenderableType:
    """The dense model, the MoE at step 0 and now, domain by domain."""
    table = Table("domain", "", title=f"held-out text, {evaluation.seq_length} tokens a sequence")
    for name in ("tokens", "bytes", "loss", "perplexity", "bits per byte"):
        table.add_column(name, justify="right")
    models = [
        ("dense", evaluation.dense),
        ("step 0", evaluation.step_0),
        (f"step {evaluation.step}", evaluation.domains),
    ]
    there = [(model, figures) for model, figures in models if figures is not None]
    for domain in evaluation.domains:
        for place, (model, figures) in enumerate(there):
            table.add_row("" if place else domain, model, *_cells(figures[domain], first=not place))
        table.add_section()
    return Group(table, *map(Text, evaluation.remarks))


def _cells(figures: Figures, *, first: bool) -> list[str]:
    """Sizes stand once a domain: they are the same for every model."""
    sizes = [_shown(figures[name], ",") if first else "" for name in ("tokens", "bytes")]
    forms = {"loss": ".4f", "perplexity": ".3f", "bits_per_byte": ".4f"}
    return [*sizes, *(_shown(figures[name], form) for name, form in forms.items())]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
