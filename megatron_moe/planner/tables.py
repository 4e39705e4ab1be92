"""Format search and check results as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_moe.planner.check import CheckResult
from megatron_moe.planner.count import ModelCounts
from megatron_moe.planner.drawing import draw, spans
from megatron_moe.planner.search import Candidate, SearchResult
from megatron_moe.planner.workload import Degrees, Workload

MEANING = {
    "gemm": "matrix products",
    "attention": "attention",
    "memory": "element-wise kernels, bound by memory",
    "tp": "tensor parallel collectives",
    "cp": "key and value exchange",
    "ep": "token all-to-all",
    "etp": "expert gather",
    "overhead": "launches and synchronization",
    "output_layer": "output layer on the last stage",
    "bubble": "pipeline bubble",
    "pp": "pipeline sends",
    "dp": "gradient and weight exchange",
    "optimizer": "optimizer",
    "teacher": "forward pass of the teacher",
}


def search_report(result: SearchResult) -> RenderableType:
    """Format the best layouts, faster ones that do not fit, and the best layout's placement."""
    best = result.best[0]
    return Group(
        _engine_line(best.work),
        *_dropped_lines(best.work),
        Text(),
        _best_table(result),
        Text(),
        _legend(result),
        Text(
            f"\n{result.num_legal} legal settings. In {result.num_state_too_large} of them, "
            "weights, gradients and\noptimizer state alone do not fit."
        ),
        *([Text(), _too_large_table(result)] if result.too_large else []),
        Text("\nWhere the ranks of the first layout lie:"),
        layout_report(best.degrees, gpus_per_node=result.gpus_per_node),
    )


def check_report(result: CheckResult, *, gpus_per_node: int = 8) -> RenderableType:
    """Format the check of one layout, its time and memory by part, and faster changes."""
    verdict = "fits" if result.fits else "legal, does not fit" if result.legal else "not legal"
    subject = "layout" if result.legal else "configuration"
    lines = [Text(f"{subject}: {verdict}"), *(Text(reason) for reason in result.reasons)]
    if result.candidate is None:
        return Group(*lines)
    time = result.candidate.time
    lines.append(
        Text(
            f"{time.mfu:.1f}% MFU with causal attention ({time.mfu_full_attention:.1f}% with full "
            f"attention), {time.tokens_per_second_per_gpu:.0f} tokens/s per GPU, "
            f"{time.step_seconds:.2f} s per step"
        )
    )
    return Group(
        *lines,
        _engine_line(result.candidate.work),
        *_dropped_lines(result.candidate.work),
        _parts_table(result.candidate),
        *(Text(f"faster: {advice}") for advice in result.advice),
        *([Text("changes that make it fit, cheapest first:")] if result.reliefs else []),
        *(Text(f"  {relief}") for relief in result.reliefs),
        layout_report(result.candidate.degrees, gpus_per_node=gpus_per_node),
    )


def _engine_line(work: Workload) -> Text:
    """Name the engine that the figures are for."""
    if work.engine == "torch":
        return Text(
            "engine: torch, which has never been measured. Its terms are passes over memory and\n"
            "the published efficiency of FlashAttention-2."
        )
    return Text("engine: Transformer Engine. If it is not installed, plan with run.engine=torch.")


def _dropped_lines(work: Workload) -> list[Text]:
    """Say that MFU counts dropped choices, if a capacity drops some of them for certain."""
    factor = work.capacity_factor
    if factor is None or factor >= 1:
        return []
    return [
        Text(
            f"At least {1 - factor:.0%} of the routed choices are dropped. MFU counts them as "
            "computed,\nas published figures do, so it is higher than what the GPU does."
        )
    ]


def counts_report(counts: ModelCounts) -> RenderableType:
    """Format the parameters of a model and the FLOPs of one sequence."""
    table = Table("", "count", title=f"one sequence of {counts.sequence_length} tokens")
    rows = {
        "total parameters": f"{counts.total_parameters / 1e9:.2f} B",
        "active parameters": f"{counts.active_parameters / 1e9:.2f} B",
        "forward, causal attention": f"{counts.causal_forward_flops / 1e12:.1f} TFLOP",
        "forward, full attention": f"{counts.forward_flops / 1e12:.1f} TFLOP",
        "training, causal attention": f"{counts.causal_training_flops / 1e12:.1f} TFLOP",
        "training, full attention": f"{counts.training_flops / 1e12:.1f} TFLOP",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for name, flops in counts.forward_flops_by_part.items():
        table.add_row(f"  forward: {name.replace('_', ' ')}", f"{flops / 1e12:.2f} TFLOP")
    table.columns[1].justify = "right"
    return table


def layout_report(degrees: Degrees, *, gpus_per_node: int = 8) -> RenderableType:
    """Format the placement of a layout's groups."""
    table = Table("group", "size", "stride", "nodes", "link", title=str(degrees))
    for span in spans(degrees, gpus_per_node=gpus_per_node):
        table.add_row(span.axis, str(span.size), str(span.stride), str(span.nodes), span.link)
    return Group(table, Text(draw(degrees, gpus_per_node=gpus_per_node)))


def _best_table(result: SearchResult) -> Table:
    """Return a table that fits into 80 columns unless a layout has many degrees."""
    title = f"{result.gpus} {result.gpu}, {result.usable_gib:.1f} GiB usable on each"
    table = _open_table(title)
    table.add_column("layout")
    _add_columns(table, "micro", "recompute", "MFU %", "tokens/s", "GiB", "limited by")
    for one in result.best:
        table.add_row(
            short_layout(one.degrees),
            str(one.work.micro_batch_size),
            one.work.recompute,
            f"{one.time.mfu:.1f}",
            f"{one.time.tokens_per_second_per_gpu:.0f}",
            f"{one.memory.total:.1f}",
            _limit(one),
        )
    return table


def _open_table(title: str = "") -> Table:
    return Table(
        title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )


def _add_columns(table: Table, *names: str) -> None:
    for name in names:
        is_text = name in ("recompute", "limited by")
        table.add_column(name, no_wrap=True, justify="left" if is_text else "right")


def short_layout(degrees: Degrees) -> str:
    """Return the degrees other than 1, and dp.

    >>> short_layout(Degrees(gpus=8, tp=2, cp=1, pp=1, ep=8, etp=1))
    'tp2 ep8 dp4'
    """
    axes = ("tp", "cp", "pp", "vpp", "ep", "etp")
    named = [(axis, getattr(degrees, axis)) for axis in axes]
    return " ".join([*(f"{axis}{size}" for axis, size in named if size > 1), f"dp{degrees.dp}"])


def _legend(result: SearchResult) -> Text:
    """Explain the columns and the names under "limited by"."""
    limits = dict.fromkeys(one.time.limit for one in result.best)
    lines = [
        "layout: degrees of parallelism other than 1. micro: train.micro_batch_size.",
        "MFU: with causal attention; papers that count full attention print "
        f"{result.best[0].time.mfu_full_attention:.1f}",
        f"for the {result.best[0].time.mfu:.1f} of the first.",
        "tokens/s: of one GPU. GiB: of the rank that needs most. limited by: the largest",
        "part of a step besides matrix products, with its share:",
        *(f"  {_SHORT.get(name, name)}: {MEANING[name]}" for name in limits),
    ]
    return Text("\n".join(lines))


_SHORT = {"output_layer": "output"}


def _limit(one: Candidate) -> str:
    name = one.time.limit
    share = 100 * one.time.parts[name] / one.time.step_seconds
    return f"{_SHORT.get(name, name)} {share:.0f}%"


def _too_large_table(result: SearchResult) -> Table:
    table = _open_table()
    table.add_column("faster, does not fit")
    _add_columns(table, "micro", "recompute", "MFU %", "GiB too many")
    for one in result.too_large:
        table.add_row(
            short_layout(one.degrees),
            str(one.work.micro_batch_size),
            one.work.recompute,
            f"{one.mfu:.1f}",
            f"{one.excess_gib:.1f}",
        )
    return table


def _parts_table(one: Candidate) -> Table:
    table = Table("time", "%", "memory", "GiB")
    times = [
        (MEANING[name], f"{100 * seconds / one.time.step_seconds:.1f}")
        for name, seconds in sorted(one.time.parts.items(), key=lambda part: -part[1])
    ]
    gib = [(name, f"{value:.1f}") for name, value in one.memory.to_json().items()]
    for row in range(max(len(times), len(gib))):
        left = times[row] if row < len(times) else ("", "")
        right = gib[row] if row < len(gib) else ("", "")
        table.add_row(*left, *right)
    return table
