"""Build the sections about the upcycling, the layout and the configuration."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_moe.config.values import Section as Settings
from megatron_moe.errors import ConfigError
from megatron_moe.parallel.layout import ParallelLayout, fold, local_experts, split_of
from megatron_moe.parallel.stages import chunk_layers
from megatron_moe.report.grids import draw_grids
from megatron_moe.report.html import Child, Html, command, el, folded, join, missing, number, table
from megatron_moe.report.parts import Section, facts, figure, figures, sample, steps_table
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles

MIB = 2**20
MAX_RANKS = 64
MAX_STAGES = 4


def receipt(run: RunFiles) -> Section:
    """Return the section about the upcycling: data read, tensors built and checks passed."""
    if run.receipt is None:
        body = missing(
            "This run has no receipt.json.",
            command(f"megatron-moe train {run.path}/config.yaml"),
            " writes it when it builds the experts.",
        )
        return Section("receipt", "Upcycling", body)
    receipt = run.receipt
    parts = [
        _receipt_facts(receipt),
        _against_dense(receipt.get("against_dense")),
        _fit((receipt.get("construction") or {}).get("fit")),
        _ranks(receipt["ranks"]),
    ]
    return Section("receipt", "Upcycling", join(parts))


def _receipt_facts(receipt: dict[str, Any]) -> Html:
    check = receipt.get("verification")
    agreement = (
        ("logits, MoE and source", "not compared", "upcycle.verify")
        if check is None
        else (
            "largest logit difference to the source",
            f"{check['max_logit_error']:.2g}",
            f"{check['argmax_agreement']:.1%} of {check['tokens']} next tokens identical",
        )
    )
    lora = receipt.get("lora")
    adapters = lora and (
        "adapters",
        f"LoRA of rank {lora['rank']}",
        f"alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}",
    )
    times = receipt["bytes_read"] / max(receipt["source_bytes"], 1)
    return facts(
        [
            ("method", receipt["method"], f"plan {receipt['plan_hash'][:12]}"),
            *([adapters] if adapters else []),
            agreement,
            (
                "read by all ranks",
                f"{_mib(receipt['bytes_read'])} MiB",
                f"{times:.2f} times the checkpoint's {_mib(receipt['source_bytes'])} MiB",
            ),
            (
                "seconds",
                number(receipt["seconds"]),
                f"{receipt['tensors_covered']} source tensors used",
            ),
        ]
    )


def _against_dense(comparison: dict[str, Any] | None) -> Html | None:
    if comparison is None:
        return None
    rows: list[list[Child]] = [
        ["source model", number(comparison["loss_dense"])],
        ["MoE as upcycled", number(comparison["loss_moe"])],
    ]
    if comparison.get("loss_split_random_unscaled") is not None:
        loss = comparison["loss_split_random_unscaled"]
        rows.append(["a random split, unscaled", number(loss)])
    caption = (
        f"Loss on {comparison['sequences']} sequences of {comparison['text']} text, nats per token"
    )
    losses = table(["model", "loss"], rows, caption=caption)
    errors, busiest = comparison.get("output_error"), comparison.get("busiest_expert")
    pictures = [
        _by_layer(errors, "Error of each layer's output", "relative to the source"),
        _by_layer(busiest, "Busiest expert as upcycled", "tokens / mean"),
    ]
    return join([losses, figures(*pictures)])


def _fit(fits: dict[str, dict[str, Any]] | None) -> Html | None:
    """Return a picture of each layer's error before and after solving, as the plan file has it."""
    if not fits:
        return None
    layers = np.array([int(layer) for layer in fits])
    lines = [
        Line(name, layers, np.array([fit[key] for fit in fits.values()], dtype=float))
        for name, key in (("sliced", "error_before"), ("solved", "error_after"))
    ]
    title = "Fit on calibration text that was left out"
    alt = f"{title}: error of each layer's output relative to the source, before and after."
    picture = line_picture(lines, alt=alt, y="relative to the source", x="layer", from_zero=True)
    return figure(title, picture, steps_table(lines, title, axis="layer"))


def _by_layer(values: dict[str, float] | None, title: str, label: str) -> Html | None:
    if not values:
        return None
    layers, numbers = [int(layer) for layer in values], [*values.values()]
    line = Line(title, np.array(layers), np.array(numbers, dtype=float))
    alt = f"{title}: highest {number(float(np.nanmax(line.y)))}."
    picture = line_picture([line], alt=alt, y=label, x="layer", from_zero=True)
    return figure(title, picture, steps_table([line], title, axis="layer"))


def _ranks(ranks: list[dict[str, Any]]) -> Html:
    shown = [ranks[i] for i in sample(len(ranks), MAX_RANKS)]
    rows = [
        [
            str(rank["rank"]),
            *(_mib(rank[name]) for name in ("bytes_read", "parameter_bytes", "peak_bytes")),
            number(rank["seconds"]),
        ]
        for rank in shown
    ]
    head = ["rank", "read, MiB", "parameters, MiB", "peak memory, MiB", "seconds"]
    subset = "" if len(shown) == len(ranks) else f", {len(shown)} of {len(ranks)}"
    return folded(f"By rank{subset}", table(head, rows, caption="Cost of upcycling on each rank"))


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f}"


def layout(run: RunFiles) -> Section:
    """Return the section that shows which rank holds what, as drawings and as a table."""
    title = "Parallel layout"
    if run.world_size is None:
        body = missing(
            "The number of ranks is not known yet.",
            command(f"megatron-moe train {run.path}/config.yaml"),
            " records it in its first files.",
        )
        return Section("layout", title, body)
    try:
        folded_ranks = fold(run.config.parallel, world_size=run.world_size)
    except ConfigError as error:
        reason = (
            f"{run.world_size} ranks wrote the last files, but config.yaml is for another number:"
        )
        return Section("layout", title, missing(reason, str(error).splitlines()[0]))
    return Section("layout", title, _drawn(run, folded_ranks, run.world_size))


def _drawn(run: RunFiles, ranks: ParallelLayout, world_size: int) -> Html:
    stages = ranks.attention.size("pp")
    intro = el(
        "p",
        "The same ranks form two grids: one for attention, norms and router, and one for the "
        "experts. Each number is a rank. Each color is an ep coordinate: it shows where the ranks "
        "that hold the same experts are in the attention grid.",
    )
    drawings = [
        el(
            "div",
            el("h3", _stage_title(run, ranks, stage, world_size)),
            draw_grids(ranks, stage=stage, num_experts=run.config.moe.num_moe_experts),
        )
        for stage in range(min(stages, MAX_STAGES))
    ]
    more = el("p", f"{stages - MAX_STAGES} more stages have the same layout.")
    return join(
        [
            intro,
            *drawings,
            more if stages > MAX_STAGES else None,
            _rank_table(run, ranks, world_size),
        ]
    )


def _stage_title(run: RunFiles, ranks: ParallelLayout, stage: int, world_size: int) -> str:
    per_stage = world_size // ranks.attention.size("pp")
    first = stage * per_stage
    stage_ranks = f"Ranks {first} to {first + per_stage - 1}" if per_stage > 1 else f"Rank {first}"
    return f"{stage_ranks}: layers {_layers(run, ranks, stage)}"


def _layers(run: RunFiles, ranks: ParallelLayout, stage: int) -> str:
    """Return the layers of a pipeline stage as text, one range per model chunk."""
    pp = ranks.attention.size("pp")
    vpp = run.config.parallel.virtual_pipeline_parallel_size or 1
    if run.spec is None:
        return "all" if pp == 1 else f"of stage {stage}"
    split = split_of(run.config.parallel)
    chunks = [
        chunk_layers(
            num_layers=run.spec.num_layers,
            pp=pp,
            vpp=vpp,
            split=split,
            pp_rank=stage,
            vpp_rank=chunk,
        )
        for chunk in range(vpp)
    ]
    return ", ".join(_range(chunk) for chunk in chunks)


def _range(held: range) -> str:
    if len(held) < 2:
        return str(held[0]) if held else "none"
    return f"{held[0]}\u2013{held[-1]}"


def _rank_table(run: RunFiles, ranks: ParallelLayout, world_size: int) -> Html:
    shown = sample(world_size, MAX_RANKS)
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
                _range(held),
            ]
        )
    head = ["rank", "layers", "pp", "dp", "cp", "tp", "edp", "ep", "etp", "experts"]
    subset = "" if len(shown) == world_size else f", {len(shown)} of {world_size}"
    return folded(f"By rank{subset}", table(head, rows, caption="Layers and experts of each rank"))


def configuration(run: RunFiles) -> Section:
    """Return the section with the settings that differ from defaults, and all with descriptions."""
    settings = list(settings_of(run.config))
    changed = [[name, shown(value)] for name, value, default, _ in settings if value != default]
    rows = [[name, shown(value), meaning] for name, value, _, meaning in settings]
    body = [
        table(["setting", "value"], changed, caption="Settings that differ from the defaults"),
        folded(
            "All settings", table(["setting", "value", "meaning"], rows, caption="All settings")
        ),
        folded("config.yaml", el("pre", run.config_text, tabindex=0)),
    ]
    return Section("configuration", "Configuration", join(body))


def settings_of(config: Settings, prefix: str = "") -> list[tuple[str, Any, Any, str]]:
    """Return name, value, default (... if it has none) and description of each setting."""
    settings = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            settings += settings_of(value, f"{prefix}{name}.")
        else:
            default = ... if field.is_required() else field.get_default()
            settings.append((f"{prefix}{name}", value, default, field.description or ""))
    return settings


def shown(value: Any) -> str:
    """Format a setting's value on one line, as in YAML."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Settings():
            present = ((name, item) for name, item in value if item is not None)
            return ", ".join(f"{name}: {shown(item)}" for name, item in present)
        case dict():
            return "; ".join(f"{name} ({shown(item)})" for name, item in value.items())
        case list() | tuple():
            return "[" + ", ".join(map(shown, value)) + "]"
        case _:
            return str(value)
