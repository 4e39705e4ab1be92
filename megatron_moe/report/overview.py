"""Build the header of a report: a description of the run, and its key numbers."""

from __future__ import annotations

import numpy as np

from megatron_moe.report.html import Html, el, join, number
from megatron_moe.report.parts import facts
from megatron_moe.report.read import RunFiles

Fact = tuple[str, str, str]


def overview(run: RunFiles) -> Html:
    """Return the run's name, a one-sentence description, key facts and unreadable files."""
    return join([el("h1", el("bdi", run.name)), el("p", sentence(run), class_="lead"),
                 facts(facts_of(run)), _problems(run.problems)])  # fmt: skip


_ACTS = {"keep": "continued with its", "grow": "grown to", "prune": "pruned to"}


def sentence(run: RunFiles) -> str:
    """Describe in one sentence which model the run upcycles, and how."""
    moe, plan = run.config.moe, run.config.upcycle
    layers = run.moe_layers
    where = "" if layers is None else f" in {len(layers)} layers"
    family = "the source" if run.spec is None else f"{run.spec.family}, {run.config.source.path}"
    size = run.world_size
    ranks = "" if size is None else f", on {size} {'rank' if size == 1 else 'ranks'}"
    act = _ACTS.get(plan.method, "upcycled to")
    return (
        f"{family}, {act} {moe.num_moe_experts} experts top-{moe.moe_router_topk}{where} by "
        f"{plan.method}{ranks}."
    )


def facts_of(run: RunFiles) -> list[Fact]:
    """Return the key numbers of the run that have been logged."""
    steps = run.config.train.steps
    facts: list[Fact | None] = [
        ("step", f"{run.history.last_step:,}", f"of {steps:,}"),
        _tokens(run),
        _held_out(run),
        _last(run, "loss/lm", "training loss", "last step, nats per token"),
        _middle(run, "throughput/tokens_per_second_per_gpu", "tokens/s and rank"),
        _middle(run, "throughput/mfu", "MFU, causal attention", percent=True),
        _middle(run, "throughput/mfu_full_attention", "MFU, full attention", percent=True),
        _last(run, "router/load_imbalance", "busiest expert", "times the mean, last step"),
        _last(run, "router/drop_rate", "choices dropped", "last step", percent=True),
    ]
    return [fact for fact in facts if fact is not None]


def _last(
    run: RunFiles, name: str, title: str, remark: str, *, percent: bool = False
) -> Fact | None:
    series = run.history.series(name)
    if series is None:
        return None
    return title, _written(float(series.values[-1]), percent=percent), remark


def _tokens(run: RunFiles) -> Fact | None:
    series = run.history.series("tokens/seen")
    if series is None:
        return None
    seen = float(series.values[-1])
    size, unit = next((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1, "")) if seen >= s or s == 1)
    return (
        "tokens seen",
        f"{number(float(f'{seen / size:.4g}'))}{unit}",
        "since the start of the run",
    )


def _middle(run: RunFiles, name: str, title: str, *, percent: bool = False) -> Fact | None:
    series = run.history.series(name)
    if series is None:
        return None
    return (
        title,
        _written(float(np.nanmedian(series.values)), percent=percent),
        "median of the steps",
    )


def _written(value: float, *, percent: bool) -> str:
    return f"{value:.1%}" if percent else number(value)


def _held_out(run: RunFiles) -> Fact | None:
    series = run.history.series("loss/validation")
    if series is None:
        return None
    first, last = series.values[0], series.values[-1]
    before = f"{number(float(first))} at step {series.steps[0]:,}"
    remark = (
        f"at step {series.steps[-1]:,}; {before}" if len(series) > 1 else "nats per token, step 0"
    )
    return "held-out loss", number(float(last)), remark


def _problems(problems: list[str]) -> Html | None:
    if not problems:
        return None
    title = el("strong", "Some files could not be read")
    return el("div", title, el("ul", [el("li", line) for line in problems]), class_="wrong")
