"""Records as Markdown, to be pasted into a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_moe.bench.record import (
    PHASES,
    CollectivesRecord,
    Record,
    Spread,
    StepsRecord,
    Surroundings,
)
from megatron_moe.markdown import markdown_table

STEPS_HEAD = (
    "run", "device", "layout", "routing", "capacity", "weights", "step s", "tokens/s/GPU",
    "TFLOP/s/GPU", "MFU %", "MFU % full attention", "imbalance", "dropped %", "peak GiB", "commit",
)  # fmt: skip


def tables(records: Iterable[Record]) -> str:
    """Steps, their phases and collectives, each a table of its own; medians [p10, p90]."""
    records = list(records)
    steps = [record for record in records if isinstance(record, StepsRecord)]
    networks = [record for record in records if isinstance(record, CollectivesRecord)]
    parts = []
    if steps:
        parts += [
            markdown_table(STEPS_HEAD, map(_steps_row, steps)),
            _phases_table(steps),
            _notes(steps),
        ]
    parts += [_collectives_table(record) for record in networks]
    return "\n".join(parts)


def _steps_row(record: StepsRecord) -> tuple[str, ...]:
    return (
        record.name,
        _where(record.surroundings),
        _layout(record.layout),
        record.routing,
        _capacity(record),
        record.weights,
        str(record.step_seconds),
        str(record.tokens_per_second_per_gpu),
        str(record.tflops_per_gpu),
        str(_percent(record.mfu)),
        str(_percent(record.mfu_full_attention)),
        f"{record.load_imbalance.median:.2f}",
        f"{100 * record.drop_rate.median:.1f}",
        f"{record.peak_memory_gib:.1f}",
        _commit(record.surroundings),
    )


def _phases_table(records: Sequence[StepsRecord]) -> str:
    head = ("run", *(f"{phase} s" for phase in PHASES), "sum s")
    rows = [
        (
            f"{record.name}, {record.routing}",
            *(f"{record.phases.seconds[phase].median:.4f}" for phase in PHASES),
            f"{record.phases.step_seconds.median:.4f}",
        )
        for record in records
    ]
    return markdown_table(head, rows)


def _notes(records: Sequence[StepsRecord]) -> str:
    sources = sorted({record.mfu_is.denominator_source for record in records})
    formulas = sorted({record.mfu_is.formula for record in records})
    return "".join(
        f"{line}\n"
        for line in (
            f"MFU is {'; or '.join(formulas)}.",
            f"Denominator: {'; or '.join(sources)}.",
            f"Phases: {records[0].phases.how}.",
        )
    )


def _collectives_table(record: CollectivesRecord) -> str:
    head = ("collective", "group", "ranks", "bytes", "us", "bus GB/s")
    rows = [
        (
            timing.collective, timing.group, str(timing.ranks), f"{timing.bytes:,}",
            str(_scaled(timing.seconds, 1e6)), f"{timing.bus_gb_per_second:.2f}",
        )
        for timing in record.timings
    ]  # fmt: skip
    return f"{_where(record.surroundings)}\n\n{markdown_table(head, rows)}"


def _where(of: Surroundings) -> str:
    hosts = f" on {of.hosts} hosts" if of.hosts > 1 else ""
    return f"{of.ranks} x {of.device}{hosts}"


def _layout(degrees: dict[str, int]) -> str:
    return " ".join(f"{axis}{size}" for axis, size in degrees.items() if size > 1) or "one rank"


def _capacity(record: StepsRecord) -> str:
    limit = record.capacity
    if limit is None:
        return "dropless"
    padded = ", padded" if limit.padded else ""
    return f"{limit.factor:g} ({limit.formula}: {limit.tokens_per_expert} tokens{padded})"


def _commit(of: Surroundings) -> str:
    if of.commit is None:
        return "unknown"
    return of.commit[:10] + ("+" if of.uncommitted_changes else "")


def _percent(fraction: Spread) -> Spread:
    return _scaled(fraction, 100)


def _scaled(value: Spread, factor: float) -> Spread:
    return Spread(median=value.median * factor, p10=value.p10 * factor, p90=value.p90 * factor)
