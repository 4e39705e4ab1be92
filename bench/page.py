#!/usr/bin/env python3
"""The tables of docs/performance.md, from bench/results/*.json; a test compares the two.

python bench/page.py          # write them anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

from megatron_moe.markdown import markdown_table

PAGE = ROOT / "docs" / "performance.md"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Cases = dict[str, Any]


def with_tables(text: str, results: Path = RESULTS) -> str:
    """The page with every table as the results have it."""

    def written(block: re.Match[str]) -> str:
        head, name, end = block.groups()
        file = results / f"{name}.json"
        if not file.exists():
            return f"{head}Not measured yet.\n{end}"
        return head + TABLES[name](json.loads(file.read_text(encoding="utf-8"))) + end

    return _BLOCK.sub(written, text)


def step_table(cases: Cases) -> str:
    """Ours beside the peer, a row a case."""
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
        "case", "ours tok/s", "our MFU", "peer tok/s", "peer MFU", "ours / peer", "target",
        "2 ranks / 1 process", "product GFLOP/s", "rounds", "load before",
    )  # fmt: skip
    return markdown_table(head, rows) + _machine(cases)


def _mfu(value: float, target: float | None) -> str:
    return f"{value:.0%}" + (f", >= {target:.0%}: {_verdict(value >= target)}" if target else "")


def upcycle_table(cases: Cases) -> str:
    """Sides of each case, then one rank of 512."""
    rows = [
        (
            name,
            side,
            f"{told['seconds']['median']:.2f}",
            f"{told['cpu_seconds']['median']:.2f}",
            f"{told['peak_mib']:.0f}",
            f"{told['beside_shard_mib']:.0f}",
            _against(side, case),
            _load(case),
        )
        for name, case in cases.items()
        for side, told in case.get("sides", {}).items()
    ]
    head = (
        "case", "side", "seconds", "CPU seconds", "peak MiB", "beside the shard MiB",
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
        f"{over['seconds']:.1f} ({over['cpu_seconds']:.1f}) times as long as ours, "
        f"{_target(over['seconds'], 2, more=True)}; {over['peak']:.1f} times the memory, "
        f"{_target(over['peak'], 5, more=True)}"
    )


def _one_of_512(one: dict[str, Any]) -> str:
    degrees = (f"{key.removesuffix('_parallel_size')} {n}" for key, n in one["layout"].items())
    return (
        f"\nOne rank of 512 ({', '.join(degrees)}) of a model of Llama-3-70B's shape, a sparse "
        f"file of {one['file_gib']} GiB: {one['seconds']} s for {one['shard_mib']} MiB, of which "
        f"{one['read_mib']} MiB are read; {one['open_seconds']} s to open the file; "
        f"{one['beside_shard_mib']} MiB beside the shard; load before "
        f"{one['machine']['load_before']}.\n"
    )


def communication_table(cases: Cases) -> str:
    """Bytes by group: counted and by formula."""
    rows = []
    for name, case in cases.items():
        for group, told in case["groups"].items():
            counted = f"{told['counted_bytes']:,}" if "counted_bytes" in told else "-"
            rows.append((
                name, group, counted, f"{told['formula_bytes']:,}",
                f"{told['sent_per_rank_bytes']:,}",
            ))  # fmt: skip
    return markdown_table(
        ("layout", "group", "counted", "formula", "must leave a rank"), rows
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
            ("the same and what steps beside it lose / save", whole, 0.05, case),
        ]
    told = (
        (label, _spread(found), _target(found["median"], target, more=False), _load(case))
        for label, found, target, case in rows
    )
    return markdown_table(("what", "measured", "target", "load before"), told) + _machine(cases)


def growth_table(cases: Cases) -> str:
    """Fitted exponents of each curve."""
    rows = []
    for name, case in cases.items():
        for part, exponents in case["exponents"].items():
            ends = f"{case['seconds'][0][part]:.3g} to {case['seconds'][-1][part]:.3g} s"
            rows.append((
                f"{name} {case['values'][0]} to {case['values'][-1]}", part, ends,
                f"{exponents['fitted']:.2f}", f"{exponents['last']:.2f}",
                case["must"], _load(case),
            ))  # fmt: skip
    head = ("size", "part", "seconds", "exponent", "last doubling", "must", "load before")
    plots = " ".join(f"![{name}](growth-{name}.svg)" for name in cases)
    return f"{markdown_table(head, rows)}{_machine(cases)}\n{plots}\n"


def construct_table(cases: Cases) -> str:
    """Minutes and memory."""
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
    told = [case["machine"] for case in cases.values()]
    commits = ", ".join(sorted({str(one["commit"]) for one in told}))
    one = told[0]
    first, last = min(o["time"] for o in told), max(o["time"] for o in told)
    when = first[:16] if first[:16] == last[:16] else f"{first[:16]} to {last[:16]}"
    return (
        f"\n{when} UTC, {one['cores']} cores ({one['processor']}), torch {one['torch']}, "
        f"megatron-core {one['megatron-core']}, transformers {one['transformers']}, commit "
        f"{commits}; medians [p10, p90].\n"
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
