#!/usr/bin/env python3
"""A training step of ours beside MixtralForCausalLM of transformers: same model, batch and dtype.

Forward, backward, clipping and fused AdamW from the same weights on the same tokens. The sides take
turns, step by step: peer, ours, ours on two ranks of one thread each, and a large matrix product
that tells what the cores gave in that minute. The peer's experts run twice in each of its modes
first, and then in the faster one. Where only our own MFU has a target, ours runs alone.

    python bench/step.py --case base-fp32 --rounds 3      # one case, a minute or two
    python bench/step.py --record                         # all, into bench/results/step.json

A ratio above 1 is in our favour: seconds of the peer's step over seconds of ours, of one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import keep, machine, ratios, say, spread_of
from step_cases import CASES, Case
from workers import Worker

SCRIPTS = {"peer": "step_peer.py", "ours": "step_ours.py", "ranks2": "step_ours.py"}
"""Script of each side."""
MODES = ("eager", "grouped_mm")
"""Modes of the peer's experts, without batched_mm, which copies an expert's weights per token."""
THREADS = 2
CLOSE = {"fp32": 2e-3, "bf16": 3e-2}
"""Tolerance of the first losses: at 9 nats, bf16 logits alone change them by 1e-2."""
Begin = Callable[[str], None]
"""Lets a side build a case."""


@dataclass(slots=True)
class Turns:
    """Seconds of each side, by round."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    ranks2: list[float] = field(default_factory=list)
    product_flops: list[float] = field(default_factory=list)
    peak_gib: dict[str, float] = field(default_factory=dict)
    mode: str = MODES[1]
    first_losses: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure the cases, print them and, if asked, keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, help="default: the case's own number")
    parser.add_argument("--record", action="store_true", help="keep in bench/results/step.json")
    args = parser.parse_args()
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(script, threads=THREADS))
            for side, script in SCRIPTS.items()
        }
        for name in args.case or CASES:
            case, surroundings = CASES[name], machine()
            sides = {side: workers[side] for side in case.sides}
            with tempfile.TemporaryDirectory() as folder:
                output = measure(case, sides, Path(folder), args.rounds or case.rounds)
            print(summary(case, output), flush=True)
            if args.record:
                keep("step", {name: output}, surroundings)


def measure(case: Case, sides: dict[str, Worker], folder: Path, rounds: int) -> dict[str, Any]:
    """Rounds of turns, and what they say."""
    dense, turns = case.dense(folder), Turns()

    def begin(side: str) -> None:
        about = {"case": case.name, "dense": str(dense), "folder": str(folder)}
        sides[side].begin(**about, ranks=2 if side == "ranks2" else 1)

    (_side_by_side if case.resident else _one_after_the_other)(case, sides, begin, turns, rounds)
    _check_same_model(case, turns.first_losses)
    return _told(case, dense, folder, turns)


def _side_by_side(
    case: Case, sides: dict[str, Worker], begin: Begin, turns: Turns, rounds: int
) -> None:
    for side in sides:
        begin(side)
    for worker in sides.values():
        worker.wait_ready()
    for side, worker in sides.items():
        _warm_up(case, side, worker, turns)
    for number in range(rounds):
        turns.product_flops.append(sides["ours"].ask(do="product")["flops"])
        for side, worker in sides.items():
            _step(case, side, worker, turns, f"round {number + 1}/{rounds}")
    for side, worker in sides.items():
        turns.peak_gib[side] = worker.ask(do="memory")["peak_gib"]
        worker.end()


def _one_after_the_other(
    case: Case, sides: dict[str, Worker], begin: Begin, turns: Turns, rounds: int
) -> None:
    for number in range(rounds):
        for side, worker in sides.items():
            begin(side)
            worker.wait_ready()
            _warm_up(case, side, worker, turns)
            if side == "ours":
                turns.product_flops.append(worker.ask(do="product")["flops"])
            _step(case, side, worker, turns, f"round {number + 1}/{rounds}")
            turns.peak_gib[side] = worker.ask(do="memory")["peak_gib"]
            worker.end()


def _warm_up(case: Case, side: str, worker: Worker, turns: Turns) -> None:
    """The first step makes the optimizer's moments; more tell the peer's better mode, in turns."""
    peer = side == "peer"
    first = worker.ask(do="step", **({"mode": turns.mode} if peer else {}))
    turns.first_losses[side] = first["loss"]
    if not case.resident:  # whose steps are long: the mode that was faster when both were tried
        return
    if not peer:
        worker.ask(do="step")
        return
    took = dict.fromkeys(MODES, float("inf"))
    for mode in MODES * 2:  # the better of two each: one that was held up says nothing
        took[mode] = min(took[mode], worker.ask(do="step", mode=mode)["seconds"])
    turns.mode = min(took, key=lambda mode: took[mode])
    output = ", ".join(f"{mode} {seconds:.2f} s" for mode, seconds in took.items())
    say(f"{case.name}: peer's experts: {output}")


def _step(case: Case, side: str, worker: Worker, turns: Turns, where: str) -> None:
    command = {"mode": turns.mode} if side == "peer" else {}
    seconds = worker.ask(do="step", **command)["seconds"]
    getattr(turns, side).append(seconds)
    say(f"{case.name}, {where}: {side} {seconds:.2f} s")


def _check_same_model(case: Case, losses: dict[str, float]) -> None:
    if max(losses.values()) - min(losses.values()) > CLOSE[case.precision]:
        raise SystemExit(f"{case.name}: the sides begin with different losses: {losses}")


def _told(case: Case, dense: Path, folder: Path, turns: Turns) -> dict[str, Any]:
    tokens = case.seq_length * case.batch
    flops = case.flops(case.config(dense, folder, 1))
    products = turns.product_flops
    output: dict[str, Any] = {
        "sizes": case.sizes, "experts": case.experts, "topk": case.topk,
        "seq_length": case.seq_length, "batch": case.batch, "precision": case.precision,
        "weights": "SmolLM2-135M" if dense.name.startswith("smollm2") else "random",
        "rounds": len(turns.ours), "target": case.target, "mfu_target": case.mfu_target,
        "first_losses": {side: round(loss, 5) for side, loss in turns.first_losses.items()},
        "product_gflops": spread_of([f / 1e9 for f in products]),
        "peak_gib": {side: round(gib, 2) for side, gib in turns.peak_gib.items()},
    }  # fmt: skip
    if turns.ranks2:
        output["layout_of_2_ranks"] = case.layout
        output["ranks2_speed"] = ratios(turns.ours, turns.ranks2)
    for side in SCRIPTS:
        if seconds := getattr(turns, side):
            output[side] = {
                "step_seconds": spread_of(seconds),
                "tokens_per_second": round(tokens / statistics.median(seconds), 1),
                "mfu": spread_of(
                    [flops / s / p for s, p in zip(seconds, products, strict=True)], digits=3
                ),
            }
    if turns.peer:
        output |= {"peer_mode": turns.mode, "ratio": ratios(turns.peer, turns.ours)}
    return output


def summary(case: Case, output: dict[str, Any]) -> str:
    """One case for the terminal."""
    product = f"matrix product {output['product_gflops']['median']:.0f} GFLOP/s"
    lines = [f"{case.name}, {product}"]
    for side in SCRIPTS:
        if side in output:
            result = output[side]
            lines.append(
                f"  {side:7s} {result['step_seconds']['median']:.3f} s a step, "
                f"{result['tokens_per_second']:.0f} tokens/s, "
                f"MFU {result['mfu']['median']:.1%}, {output['peak_gib'][side]:.1f} GiB"
            )
    if (ratio := output.get("ratio")) is not None:
        lines.append(
            f"  {ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}] times the peer, "
            f"whose experts run in {output['peer_mode']}; {case.target} wanted"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
