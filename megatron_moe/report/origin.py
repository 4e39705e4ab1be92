"""Sections about where a run came from: the upcycling, the layout, the configuration."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_moe.config.run import Section as Settings
from megatron_moe.errors import ConfigError
from megatron_moe.parallel.layout import ParallelLayout, fold, local_experts
from megatron_moe.parallel.stages import chunk_layers
from megatron_moe.report.grids import draw_grids
from megatron_moe.report.html import Child, Html, command, el, folded, join, missing, number, table
from megatron_moe.report.parts import Section, facts, figure, figures, sample, steps_table
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles

MIB = 2**20
MOST_RANKS = 64
MOST_STAGES = 4


def receipt(run: RunFiles) -> Section:
    """What upcycling read, made and proved."""
    if run.receipt is None:
        body = missing(
            "There is no receipt of an upcycling.",
            command(f"megatron-moe train {run.path}/config.yaml"),
            " writes receipt.json when it builds the experts.",
        )
        return Section("receipt", "How it began", body)
    told = run.receipt
    parts = [_receipt_facts(told), _against_dense(told.get("against_dense")), _ranks(told["ranks"])]
    return Section("receipt", "How it began", join(parts))


def _receipt_facts(told: dict[str, Any]) -> Html:
    check = told.get("verification")
    agreement = (
        ("logits, MoE and dense", "not compared", "upcycle.verify")
        if check is None
        else (
            "largest logit difference to dense",
            f"{check['max_logit_error']:.2g}",
            f"{check['argmax_agreement']:.1%} of {check['tokens']} next tokens the same",
        )
    )
    times = told["bytes_read"] / max(told["source_bytes"], 1)
    return facts(
        [
            ("method", told["method"], f"plan {told['plan_hash'][:12]}"),
            agreement,
            (
                "read by all ranks",
                f"{_mib(told['bytes_read'])} MiB",
                f"{times:.2f} times the checkpoint's {_mib(told['source_bytes'])} MiB",
            ),
            ("seconds", number(told["seconds"]), f"{told['tensors_covered']} dense tensors used"),
        ]
    )


def _against_dense(told: dict[str, Any] | None) -> Html | None:
    if told is None:
        return None
    rows: list[list[Child]] = [
        ["dense model", number(told["loss_dense"])],
        ["MoE as upcycled", number(told["loss_moe"])],
    ]
    if told.get("loss_split_random_unscaled") is not None:
        rows.append(["a random split, unscaled", number(told["loss_split_random_unscaled"])])
    caption = f"Loss on {told['sequences']} sequences of {told['text']} text, nats per token"
    losses = table(["model", "loss"], rows, caption=caption)
    pictures = [
        _of_layers(told.get("output_error"), "Error of each layer's output", "relative to dense"),
        _of_layers(told.get("busiest_expert"), "Busiest expert as upcycled", "tokens / mean"),
    ]
    return join([losses, figures(*pictures)])


def _of_layers(told: dict[str, float] | None, title: str, label: str) -> Html | None:
    if not told:
        return None
    line = Line(title, np.array([int(i) for i in told]), np.array([*told.values()], dtype=float))
    alt = f"{title}: highest {number(float(np.nanmax(line.y)))}."
    picture = line_picture([line], alt=alt, y=label, x="layer", from_zero=True)
    return figure(title, picture, steps_table([line], title, axis="layer"))


def _ranks(ranks: list[dict[str, Any]]) -> Html:
    shown = [ranks[i] for i in sample(len(ranks), MOST_RANKS)]
    rows = [
        [
            str(rank["rank"]),
            *(_mib(rank[name]) for name in ("bytes_read", "parameter_bytes", "peak_bytes")),
            number(rank["seconds"]),
        ]
        for rank in shown
    ]
    head = ["rank", "read, MiB", "parameters, MiB", "most held, MiB", "seconds"]
    some = "" if len(shown) == len(ranks) else f", {len(shown)} of {len(ranks)}"
    return folded(f"By rank{some}", table(head, rows, caption="What upcycling took on each rank"))


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f}"


def layout(run: RunFiles) -> Section:
    """Who holds what, drawn and as a table."""
    title = "Who holds what"
    if run.world_size is None:
        body = missing(
            "How many ranks the job has is not known yet.",
            command(f"megatron-moe train {run.path}/config.yaml"),
            " says so in its first files.",
        )
        return Section("layout", title, body)
    try:
        folded_ranks = fold(run.config.parallel, world_size=run.world_size)
    except ConfigError as error:
        reason = f"{run.world_size} ranks wrote the last files, and config.yaml names another job:"
        return Section("layout", title, missing(reason, str(error).splitlines()[0]))
    return Section("layout", title, _drawn(run, folded_ranks, run.world_size))


def _drawn(run: RunFiles, ranks: ParallelLayout, world_size: int) -> Html:
    stages = ranks.attention.size("pp")
    intro = el(
        "p",
        "The same ranks are numbered twice: once for attention, norms and router, once for the "
        "experts. A number is a rank; a colour is one ep coordinate, and shows where the ranks "
        "that hold the same experts sit in the attention grid.",
    )
    drawings = [
        el(
            "div",
            el("h3", _stage_title(run, ranks, stage, world_size)),
            draw_grids(ranks, stage=stage, num_experts=run.config.moe.num_moe_experts),
        )
        for stage in range(min(stages, MOST_STAGES))
    ]
    more = el("p", f"And {stages - MOST_STAGES} more stages in the same way.")
    return join(
        [
            intro,
            *drawings,
            more if stages > MOST_STAGES else None,
            _rank_table(run, ranks, world_size),
        ]
    )


def _stage_title(run: RunFiles, ranks: ParallelLayout, stage: int, world_size: int) -> str:
    per_stage = world_size // ranks.attention.size("pp")
    first = stage * per_stage
    which = f"Ranks {first} to {first + per_stage - 1}" if per_stage > 1 else f"Rank {first}"
    return f"{which}: layers {_layers(run, ranks, stage)}"


def _layers(run: RunFiles, ranks: ParallelLayout, stage: int) -> str:
    """Layers of a pipeline stage, a run for each of its chunks."""
    pp = ranks.attention.size("pp")
    vpp = run.config.parallel.virtual_pipeline_parallel_size or 1
    if run.spec is None:
        return "all" if pp == 1 else f"of stage {stage}"
    chunks = [
        chunk_layers(num_layers=run.spec.num_layers, pp=pp, vpp=vpp, pp_rank=stage, vpp_rank=chunk)
        for chunk in range(vpp)
    ]
    return ", ".join(_run(chunk) for chunk in chunks)


def _run(held: range) -> str:
    return str(held[0]) if len(held) == 1 else f"{held[0]}\u2013{held[-1]}"


def _rank_table(run: RunFiles, ranks: ParallelLayout, world_size: int) -> Html:
    shown = sample(world_size, MOST_RANKS)
    rows = []
    for rank in shown:
        attention, experts = ranks.attention.coords(rank), ranks.experts.coords(rank)
        held = local_experts(ranks, rank=rank, num_experts=run.config.moe.num_moe_experts)
        rows.append(
            [
                str(rank),
                _layers(run, ranks, attention["pp"]),
                *(str(attention[axis]) for axis in ("pp", "dp", "cp", "tp")),
                *(str(experts[axis]) for axis in ("edp", "ep", "etp")),
                _run(held),
            ]
        )
    head = ["rank", "layers", "pp", "dp", "cp", "tp", "edp", "ep", "etp", "experts"]
    some = "" if len(shown) == world_size else f", {len(shown)} of {world_size}"
    return folded(f"By rank{some}", table(head, rows, caption="What each rank holds"))


def configuration(run: RunFiles) -> Section:
    """What was set, then all settings, with what they mean."""
    every = list(settings_of(run.config))
    changed = [[name, shown(value)] for name, value, default, _ in every if value != default]
    rows = [[name, shown(value), meaning] for name, value, _, meaning in every]
    body = [
        table(["setting", "value"], changed, caption="What differs from the defaults"),
        folded(
            "All settings", table(["setting", "value", "meaning"], rows, caption="All settings")
        ),
        folded("config.yaml", el("pre", run.config_text, tabindex=0)),
    ]
    return Section("configuration", "Configuration", join(body))


def settings_of(config: Settings, prefix: str = "") -> list[tuple[str, Any, Any, str]]:
    """Every setting of a configuration: name, value, default (... where it has none), meaning."""
    found = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            found += settings_of(value, f"{prefix}{name}.")
        else:
            default = ... if field.is_required() else field.get_default()
            found.append((f"{prefix}{name}", value, default, field.description or ""))
    return found


def shown(value: Any) -> str:
    """A setting's value as YAML would hold it, on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Settings():
            set_ones = ((n, v) for n, v in value if v is not None)
            return ", ".join(f"{name}: {shown(one)}" for name, one in set_ones)
        case dict():
            return "; ".join(f"{name} ({shown(one)})" for name, one in value.items())
        case list() | tuple():
            return "[" + ", ".join(map(shown, value)) + "]"
        case _:
            return str(value)
