#!/usr/bin/env python3
"""Write the tables of docs/performance.md from bench/results/*.json; a test compares the two.

python bench/page.py          # rewrite the tables
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

from megatron_moe.markdown import markdown_table, with_tables

PAGE = ROOT / "docs" / "performance.md"
Cases = dict[str, Any]


def rendered(text: str, results: Path = RESULTS) -> str:
    """Return the page with every table rewritten from the results."""
    return with_tables(text, {name: partial(_written, name, results) for name in TABLES})


def _written(name: str, results: Path) -> str:
    file = results / f"{name}.json"
    if not file.exists():
        return "Not measured yet.\n"
    return TABLES[name](json.loads(file.read_text(encoding="utf-8")))


def step_table(cases: Cases) -> str:
    """Return the table of training steps: one row per case, ours and the peer's."""
    rows = []
    for name, case in cases.items():
        ours, two = case["ours"], case.get("ranks2_speed")
        beside = ("-",) * 4
        if (peer := case.get("peer")) is not None:
            beside = (
                f"{peer['tokens_per_second']:.0f} ({case['peer_mode']})",
                f"{peer['mfu']['median']:.0%}",
                _spread(case["ratio"]),
                _target(case["ratio"]["median"], case["target"], more=True),
            )
        rows.append((
            name,
            f"{ours['tokens_per_second']:.0f}",
            _mfu(ours["mfu"]["median"], case["mfu_target"]),
            *beside,
            _spread(two) if two else "-",
            f"{case['product_gflops']['median']:.0f}",
            str(case["rounds"]),
            _load(case),
        ))  # fmt: skip
    head = (
        "case", "ours tok/s", "our MFU, causal", "peer tok/s", "peer MFU, causal",
        "ours / peer", "target", "2 ranks / 1 process", "product GFLOP/s", "rounds", "load before",
    )  # fmt: skip
    return markdown_table(head, rows) + _machine(cases)


def _mfu(value: float, target: float | None) -> str:
    return f"{value:.0%}" + (f", >= {target:.0%}: {_verdict(value >= target)}" if target else "")


def upcycle_table(cases: Cases) -> str:
    """Return the table of upcycling: one row per case and side, then one rank of 512."""
    rows = [
        (
            name,
            side,
            f"{measured['seconds']['median']:.2f}",
            f"{measured['cpu_seconds']['median']:.2f}",
            f"{measured['peak_mib']:.0f}",
            f"{measured['beside_shard_mib']:.0f}",
            _against(side, case),
            _load(case),
        )
        for name, case in cases.items()
        for side, measured in case.get("sides", {}).items()
    ]
    head = (
        "case", "side", "seconds", "CPU seconds", "peak MiB", "MiB besides the shard",
        "wall (CPU) ratio", "load before",
    )  # fmt: skip
    one = cases.get("70B, one rank of 512")
    return markdown_table(head, rows) + (_one_of_512(one) if one else "") + _machine(cases)


def _against(side: str, case: dict[str, Any]) -> str:
    if side == "ours":
        over = case["ours_over_copying"]
        wall, busy = over["seconds"]["median"], over["cpu_seconds"]["median"]
        return f"{wall:.2f} ({busy:.2f}) of copying, {_target(wall, 1.3, more=False)}"
    if f"{side}_over_ours" not in case:
        return ""
    over = {name: one["median"] for name, one in case[f"{side}_over_ours"].items()}
    return (
        f"{over['seconds']:.1f} ({over['cpu_seconds']:.1f}) times our time, "
        f"{_target(over['seconds'], 2, more=True)}; {over['peak']:.1f} times the memory, "
        f"{_target(over['peak'], 5, more=True)}"
    )


def _one_of_512(one: dict[str, Any]) -> str:
    degrees = (f"{key.removesuffix('_parallel_size')} {n}" for key, n in one["layout"].items())
    return (
        f"\nOne rank of 512 ({', '.join(degrees)}) of a model of Llama-3-70B's shape, a sparse "
        f"file of {one['file_gib']} GiB: {one['seconds']} s for {one['shard_mib']} MiB, of which "
        f"{one['read_mib']} MiB are read; {one['open_seconds']} s to open the file; "
        f"{one['beside_shard_mib']} MiB in addition to the shard; load before "
        f"{one['machine']['load_before']}.\n"
    )


def communication_table(cases: Cases) -> str:
    """Return the table of bytes by process group: counted and by formula."""
    rows = []
    for name, case in cases.items():
        for group, count in case["groups"].items():
            counted = f"{count['counted_bytes']:,}" if "counted_bytes" in count else "-"
            rows.append((
                name, group, counted, f"{count['formula_bytes']:,}",
                f"{count['sent_per_rank_bytes']:,}",
            ))  # fmt: skip
    return markdown_table(
        ("layout", "group", "counted", "formula", "lower bound sent per rank"), rows
    ) + _machine(cases)


def startup_table(cases: Cases) -> str:
    """Return the table of start-up and save times, with their targets."""
    names = {"help": "`--help`", "plan": "`plan`, 128 GPUs", "first step": "first step, 4 ranks"}
    rows = [
        (f"{label}, s", cases[name]["seconds"], cases[name]["target"], cases[name])
        for name, label in names.items()
        if name in cases
    ]
    if (case := cases.get("save")) is not None:
        export = case["export"]
        beside, whole = case["async_stall_over_save"], case["async_all_over_save"]
        rows += [
            (f"save of {case['mib']:.0f} MiB / dd", case["over_dd"], 1.5, case),
            (f"export of {export['mib']:.0f} MiB / dd", export["over_dd"], 1.5, case),
            ("async save: training waits / save", beside, 0.05, case),
            ("async save: training waits and slower steps / save", whole, 0.05, case),
        ]
    cells = (
        (label, _spread(value), _target(value["median"], target, more=False), _load(case))
        for label, value, target, case in rows
    )
    return markdown_table(("what", "measured", "target", "load before"), cells) + _machine(cases)


def growth_table(cases: Cases) -> str:
    """Return the table of fitted exponents, one row per curve."""
    rows = []
    for name, case in cases.items():
        for part, exponents in case["exponents"].items():
            ends = f"{case['seconds'][0][part]:.3g} to {case['seconds'][-1][part]:.3g} s"
            rows.append((
                f"{name} {case['values'][0]} to {case['values'][-1]}", part, ends,
                f"{exponents['fitted']:.2f}", f"{exponents['last']:.2f}",
                case["ideal"], _load(case),
            ))  # fmt: skip
    head = ("size", "part", "seconds", "exponent", "last doubling", "ideal exponent", "load before")
    plots = " ".join(f"![{name}](growth-{name}.svg)" for name in cases)
    return f"{markdown_table(head, rows)}{_machine(cases)}\n{plots}\n"


def construct_table(cases: Cases) -> str:
    """Return the table of construction times and memory."""
    rows = [
        (
            name, case["weights"],
            f"{case['tokens']:,} tokens" if "tokens" in case else "30 layers",
            f"{case['seconds']:.0f}", f"{case['peak_mib']:,}", _load(case),
        )
        for name, case in cases.items()
    ]  # fmt: skip
    head = ("what", "weights", "of", "seconds, 2 processes", "peak MiB, together", "load before")
    return markdown_table(head, rows) + _machine(cases)


TABLES: dict[str, Callable[[Cases], str]] = {
    "step": step_table, "upcycle": upcycle_table, "communication": communication_table,
    "startup": startup_table, "growth": growth_table, "construct": construct_table,
}  # fmt: skip


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} [{value['p10']:.3g}, {value['p90']:.3g}]"


def _target(value: float, target: float | None, *, more: bool) -> str:
    if target is None:
        return "-"
    kept = value >= target if more else value <= target
    return f"{'>=' if more else '<='} {target:g}: {_verdict(kept)}"


def _verdict(kept: bool) -> str:
    return "met" if kept else "missed"


def _load(case: dict[str, Any]) -> str:
    return f"{case['machine']['load_before']:g}"


def _machine(cases: Cases) -> str:
    """Return a line with the conditions of the measurements; cases may come from several runs."""
    machines = [case["machine"] for case in cases.values()]
    commits = ", ".join(sorted({str(one["commit"]) for one in machines}))
    one = machines[0]
    first, last = min(o["time"] for o in machines), max(o["time"] for o in machines)
    when = first[:16] if first[:16] == last[:16] else f"{first[:16]} to {last[:16]}"
    return (
        f"\n{when} UTC, {one['cores']} cores ({one['processor']}), torch {one['torch']}, "
        f"megatron-core {one['megatron-core']}, transformers {one['transformers']}, commit "
        f"{commits}; medians [p10, p90].\n"
    )


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
