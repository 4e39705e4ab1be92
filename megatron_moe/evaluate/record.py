"""Results of an evaluation: their file in run.dir/evaluation, and their table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_moe.hf.disk import write_text

SCHEMA = 1
Figures = dict[str, Any]
"""tokens, bytes, loss (nats per token), perplexity and bits_per_byte of one model on one text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out losses by domain, for the source model, the MoE at step 0, and a checkpoint."""

    checkpoint: str
    step: int
    seq_length: int
    domains: dict[str, Figures]
    """Results of the checkpoint."""
    dense: dict[str, Figures] | None
    """Results of the source, dense or MoE; None if its weights are not available."""
    step_0: dict[str, Figures] | None
    """Results of the MoE before its first step."""
    remarks: tuple[str, ...] = ()
    """Reasons for missing results."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"schema": SCHEMA, "kind": "evaluation", **asdict(self)}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record``; the file appears only when it is complete."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def evaluation_report(evaluation: Evaluation) -> RenderableType:
    """Format the results of all models as a table, domain by domain."""
    title = f"held-out text, {evaluation.seq_length} tokens per sequence"
    table = Table("domain", "", title=title)
    for name in ("tokens", "bytes", "loss", "perplexity", "bits per byte"):
        table.add_column(name, justify="right")
    models = [
        ("source", evaluation.dense),
        ("step 0", evaluation.step_0),
        (f"step {evaluation.step}", evaluation.domains),
    ]
    available = [(model, figures) for model, figures in models if figures is not None]
    for domain in evaluation.domains:
        for row, (model, figures) in enumerate(available):
            table.add_row("" if row else domain, model, *_cells(figures[domain], first=not row))
        table.add_section()
    return Group(table, *map(Text, evaluation.remarks))


def _cells(figures: Figures, *, first: bool) -> list[str]:
    """Format one row; sizes are shown once per domain, because they are equal for all models."""
    sizes = [_shown(figures[name], ",") if first else "" for name in ("tokens", "bytes")]
    forms = {"loss": ".4f", "perplexity": ".3f", "bits_per_byte": ".4f"}
    return [*sizes, *(_shown(figures[name], form) for name, form in forms.items())]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
