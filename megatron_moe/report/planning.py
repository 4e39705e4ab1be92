"""Build the page of ``megatron-moe plan --report``: a layout, its memory and its time."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe.config.load import dump
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.layout import fold
from megatron_moe.planner.drawing import spans
from megatron_moe.planner.hardware import Gpu
from megatron_moe.planner.run_table import duration, run_rows
from megatron_moe.planner.search import Candidate, configured
from megatron_moe.planner.tables import MEANING, short_layout
from megatron_moe.planner.whole_run import WholeRun
from megatron_moe.report.bars import bar_figure
from megatron_moe.report.grids import draw_grids
from megatron_moe.report.html import Child, Html, el, folded, join, table
from megatron_moe.report.page import page
from megatron_moe.report.parts import Section, facts, figures

MEMORY_MEANING = {
    "optimizer": "optimizer state, sharded",
    "activations": "activations kept for the backward pass",
    "dispatcher": "rows in the token dispatcher",
    "expert_gradients": "gradients of a layer's experts",
    "communication": "communication buffers",
    "framework": "CUDA and libraries (a margin)",
    "fragmentation": "fragmentation (a margin)",
    "teacher": "the teacher",
}


def plan_page(
    config: RunConfig,
    candidate: Candidate,
    run: WholeRun,
    *,
    gpu: Gpu,
    others: Sequence[Candidate] = (),
    reasons: Sequence[str] = (),
) -> Html:
    """Return the page of one layout.

    Args:
        config: The run.
        candidate: The layout and its prediction.
        run: The prediction of all steps.
        gpu: The GPU that was planned for.
        others: Other layouts, if the page shows the result of a search.
        reasons: Reasons why the layout does not fit, if it does not.
    """
    sections = [
        Section("layout", "Layout on nodes", _layout(config, candidate, gpu)),
        Section("memory", "Memory", _memory(candidate, gpu)),
        Section("time", "Step time", _time(candidate)),
        Section("run", "The whole run", _run(run)),
        *([Section("others", "Other layouts", _others(others))] if others else []),
        Section("settings", "Settings", _settings(config, candidate)),
    ]
    name = config.source.path.name
    return page(
        f"Plan of {name} - megatron_moe", _head(config, candidate, run, gpu, reasons), sections
    )


def _head(
    config: RunConfig, one: Candidate, run: WholeRun, gpu: Gpu, reasons: Sequence[str]
) -> Html:
    moe = config.moe
    lead = (
        f"{config.source.path.name} as {moe.num_moe_experts} experts, top-{moe.moe_router_topk}, "
        f"on {one.degrees.gpus} {gpu.name}. Every number on this page is a prediction."
    )
    cost = [] if run.cost is None else [("cost", f"{run.cost:,.0f}", "at the given price")]
    work, full = one.work, f"{one.time.mfu_full_attention:.1f}%"
    batch = f"micro-batch {work.micro_batch_size}, recompute {work.recompute}"
    values: list[tuple[Child, Child, Child]] = [
        ("layout", short_layout(one.degrees), batch),
        ("MFU", f"{one.time.mfu:.1f}%", f"causal; {full} with full attention"),
        ("tokens/s", f"{one.time.tokens_per_second_per_gpu:,.0f}", "of one GPU"),
        ("step", f"{one.time.step_seconds:.2f} s", f"{one.work.global_batch_size:,} sequences"),
        ("memory", f"{one.memory.total:.1f} GiB", f"of {gpu.usable_gib:.1f} usable"),
        ("wall time", duration(run.hours), f"{run.gpu_hours:,.0f} GPU-hours"),
        *cost,
    ]  # fmt: skip
    wrong = el("div", el("ul", [el("li", reason) for reason in reasons]), class_="wrong")
    return join([
        el("h1", f"Plan of {config.source.path.name}"), el("p", lead, class_="lead"),
        wrong if reasons else None, facts(values),
    ])  # fmt: skip


def _layout(config: RunConfig, one: Candidate, gpu: Gpu) -> Html:
    ranks = fold(one.degrees.parallel(), world_size=one.degrees.gpus)
    rows = [
        [span.axis, str(span.size), str(span.stride), str(span.nodes), span.link]
        for span in spans(one.degrees, gpus_per_node=gpu.gpus_per_node)
    ]
    note = (
        f"Ranks of the first pipeline stage; {gpu.gpus_per_node} consecutive ranks share a node. A "
        "color is an ep rank, in both grids: attention and experts are folded onto the same ranks."
    )
    head = ["group", "size", "stride in ranks", "nodes of a group", "link"]
    return join([
        el("p", note),
        draw_grids(ranks, stage=0, num_experts=config.moe.num_moe_experts),
        table(head, rows, caption="Groups"),
    ])  # fmt: skip


def _memory(one: Candidate, gpu: Gpu) -> Html:
    parts = {k: v for k, v in one.memory.to_json().items() if k != "total"}
    named = {MEMORY_MEANING.get(name, name): gib for name, gib in parts.items()}
    left = gpu.usable_gib - one.memory.total
    note = (
        f"{one.memory.total:.1f} of {gpu.hbm_gib:.1f} GiB on the rank that needs most; "
        f"{abs(left):.1f} GiB {'to spare' if left >= 0 else 'too many'}."
    )
    return figures(bar_figure("Memory of a rank", named, unit="GiB", note=note))


def _time(one: Candidate) -> Html:
    named = {MEANING[name]: seconds for name, seconds in one.time.parts.items()}
    note = f"{one.time.step_seconds:.2f} s; what overlaps with computation is not counted twice."
    return figures(bar_figure("Time of a step", named, unit="s", note=note))


def _run(run: WholeRun) -> Html:
    return table(["", "prediction"], [list(row) for row in run_rows(run)], caption="The whole run")


def _others(others: Sequence[Candidate]) -> Html:
    rows = [
        [
            short_layout(one.degrees), str(one.work.micro_batch_size), one.work.recompute,
            f"{one.time.mfu:.1f}", f"{one.time.tokens_per_second_per_gpu:,.0f}",
            f"{one.memory.total:.1f}", MEANING[one.time.limit],
        ]
        for one in others
    ]  # fmt: skip
    head = ["layout", "micro-batch", "recompute", "MFU %", "tokens/s a GPU", "GiB", "limited by"]
    return table(head, rows, caption="Layouts that fit, the fastest first")


def _settings(config: RunConfig, one: Candidate) -> Html:
    planned = configured(config, one.degrees, one.work)
    train = planned.train.model_copy(update={"recompute": one.work.recompute})
    return folded(
        "Configuration with this layout",
        el("pre", dump(planned.model_copy(update={"train": train}))),
    )
