"""Format the prediction of a whole run as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_moe.planner.epochs import Epochs
from megatron_moe.planner.whole_run import RESTART_SECONDS, WholeRun


def run_report(run: WholeRun) -> RenderableType:
    """Format days, cost, disk and losses of a run."""
    table = Table(title="the whole run", title_justify="left", show_header=False, box=None)
    for name, value in run_rows(run):
        table.add_row(name, value)
    note = (
        f"A failure costs {RESTART_SECONDS // 60} minutes of restart and the steps since the last "
        "checkpoint.\n"
        "Steps take the predicted time of a benchmark. Stalls, evaluation and slow nodes come on\n"
        "top: the 100B-token run of arXiv 2412.09952 averaged about half of its benchmark's MFU."
    )
    return Group(table, Text(note))


def run_rows(run: WholeRun) -> list[tuple[str, str]]:
    """Return the rows of the table: a name and a value with its unit."""
    rows = [
        ("steps, tokens", f"{run.steps:,} steps, {amount(run.tokens)} tokens"),
        ("wall time", f"{duration(run.hours)}; steps alone {duration(run.step_hours)}"),
        ("GPU-hours", f"{run.gpu_hours:,.0f}"),
        *((("cost", f"{run.cost:,.0f}"),) if run.cost is not None else ()),
        (
            "checkpoints",
            f"{run.num_checkpoints}, each {size(run.checkpoint_bytes)}; "
            f"{size(run.disk_bytes)} of disk",
        ),
        (
            "failures",
            f"{run.failures:.1f} expected, one in {duration(run.mtbf_hours)}; lost: "
            f"{duration(run.failure_hours)}",
        ),
        ("saving", f"{duration(run.saving_hours)}; {run.save_seconds:.0f} s per checkpoint"),
        ("checkpoint.interval", _interval(run)),
        (
            "read",
            f"{size(run.source_bytes_read)} of the dense model, "
            f"{size(run.text_bytes_read)} of tokens",
        ),
    ]
    return [*rows, *(("epochs", _epochs(one)) for one in run.epochs)]


def _interval(run: WholeRun) -> str:
    saved = run.hours - run.best_hours
    text = f"{run.interval}; best {run.best_interval} (Daly)"
    return f"{text}, which saves {duration(saved)}" if saved > 0.01 * run.hours else text


def _epochs(one: Epochs) -> str:
    if one.epochs is None:
        return f"{one.domain}: {amount(one.tokens)} tokens of a text that is not tokenized yet"
    return f"{one.domain}: {one.epochs:.2f} times {amount(one.available or 0)} tokens"


def duration(hours: float) -> str:
    """Return a time in words.

    >>> duration(0.05), duration(7.2), duration(100), duration(1e9)
    ('3 min', '7.2 h', '4.2 days', 'centuries')
    """
    if hours > 1e6:
        return "centuries"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def size(count: float) -> str:
    """Return bytes in words.

    >>> size(6.65e11), size(3e8)
    ('665 GB', '300 MB')
    """
    unit, factor = next(
        (u, f) for u, f in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        if count >= f or u == "kB"
    )  # fmt: skip
    return f"{count / factor:.3g} {unit}"


def amount(count: float) -> str:
    """Return a number of tokens or parameters in words.

    >>> amount(1e11), amount(8.03e9), amount(10240)
    ('100 B', '8.03 B', '10,240')
    """
    unit, factor = next(
        (u, f) for u, f in ((" T", 1e12), (" B", 1e9), (" M", 1e6), ("", 1)) if count >= f or f == 1
    )
    return f"{count / factor:.3g}{unit}" if unit else f"{count:,}"
