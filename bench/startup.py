#!/usr/bin/env python3
"""Measure the time to start a run and to save a checkpoint.

Each is repeated, and whatever it is compared with comes in between:

    help, plan      the command from start to end; plan also for 1,024 GPUs
    first step      a tiny model on 4 ranks: from the command to the first step in metrics.jsonl
    save, export    against dd writing as many bytes to the same disk, both with fsync
    async save      what a save beside training takes of it: until it returns, and of steps

    python bench/startup.py          # into bench/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dense import config_of, random_dense
from harness import ROOT, keep, machine, ratios, say, spread_of

PROGRAM = [sys.executable, "-m", "megatron_moe"]
TINY = {"layers": 4, "hidden": 64, "ffn": 96, "heads": 8, "kv_heads": 4, "vocab": 257}
STATE = {"layers": 8, "hidden": 512, "ffn": 1024, "heads": 8, "kv_heads": 8, "vocab": 8192}
"""Model of the saved run: 8 experts, 117 M parameters, 1.3 GiB with fp32 moments."""
LLAMA3 = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256}
SCRATCH = ROOT / "runs" / "bench"
MIB = 2**20


def main() -> None:
    """Measure what is asked for and keep it."""
    cases: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        "help": help_, "plan": plan, "plan 1024": plan_1024, "first step": first_step, "save": save,
    }  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the first step at most 2")
    parser.add_argument("--only", choices=list(cases), action="append")
    parser.add_argument("--save-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save_rank:
        _save_process(json.loads(args.save_rank))
        return
    for name in args.only or cases:
        surroundings = machine()
        # In runs/, not in /tmp: that may be memory, and dd must meet the same disk.
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            output = cases[name](Path(folder), args.rounds)
        keep("startup", {name: output}, surroundings)
        print(json.dumps({name: output}, indent=1), flush=True)


def help_(scratch: Path, rounds: int) -> dict[str, Any]:
    """`megatron-moe --help`."""
    command = [*PROGRAM, "--help"]
    return {**_timed("help", command, rounds), "target": 0.5, "torch": _imports(command)}


def plan(scratch: Path, rounds: int) -> dict[str, Any]:
    """`megatron-moe plan` over every layout of 128 GPUs for Llama-3-8B."""
    dense = scratch / "Meta-Llama-3-8B"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(config_of(**LLAMA3)))
    file = ROOT / "configs" / "h100" / "llama3-8b-e8t2-dropless-128.yaml"
    command = [*PROGRAM, "plan", str(file), f"source.path={dense}", "--gpus", "128"]
    return {**_timed("plan", command, rounds), "target": 2.0, "torch": _imports(command)}


def plan_1024(scratch: Path, rounds: int) -> dict[str, Any]:
    """`megatron-moe plan` for 1,024 GPUs: of a model that fits, and of one that never does."""
    output: dict[str, Any] = {"target": 2.0}
    for model in ("llama-3-70b", "llama-3.1-405b"):
        command = [*PROGRAM, "plan", "--model", model, "--gpus", "1024"]
        output[model] = _timed(f"plan, {model}", command, rounds, fails=model == "llama-3.1-405b")
    return output


def first_step(scratch: Path, rounds: int) -> dict[str, Any]:
    """`megatron-moe train --ranks 4` of a tiny model, until its first step is logged."""
    dense, tokens = random_dense(scratch / "dense", config_of(**TINY)), scratch / "tokens"
    _write_tokens(tokens, vocab_size=257)
    seconds = []
    for number in range(min(rounds, 2)):
        run = scratch / f"run-{number}"
        command = [*PROGRAM, "train", str(_settings(scratch, dense, tokens, run)), "--ranks", "4"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
        while not _has_step(run / "metrics.jsonl", 1):
            if process.poll() not in (None, 0):
                raise SystemExit("the run failed")
            time.sleep(0.02)
        seconds.append(time.perf_counter() - start)
        process.wait()
        say(f"startup, first step, round {number + 1}: {seconds[-1]:.2f} s")
    return {"seconds": spread_of(seconds), "target": 15.0}


def save(scratch: Path, rounds: int) -> dict[str, Any]:
    """A training state saved, saved beside training, exported; dd in between, turn by turn."""
    dense, tokens = random_dense(scratch / "dense", config_of(**STATE)), scratch / "tokens"
    _write_tokens(tokens, vocab_size=8192)
    about = {"dense": str(dense), "tokens": str(tokens), "scratch": str(scratch), "rounds": rounds}
    done = subprocess.run(
        [sys.executable, __file__, "--save-rank", json.dumps(about)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    output = json.loads(done.stdout.splitlines()[-1])
    exports, copies = [], []
    for number in range(rounds):
        out = scratch / f"export-{number}"
        exports.append(_export(scratch / "run-sync", out))
        size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
        shutil.rmtree(out)
        copies.append(dd(scratch, size))
        last = f"{exports[-1]:.2f} s, dd {copies[-1]:.2f} s"
        say(f"startup, export, round {number + 1}/{rounds}: {last}")
    output["export"] = {
        "mib": round(size / MIB, 1),
        "seconds": spread_of(exports),
        "over_dd": ratios(exports, copies),
        "target_over_dd": 1.5,
    }
    return output


def dd(scratch: Path, size: int) -> float:
    """Seconds of `dd` writing and fsyncing ``size`` bytes of data that is not zero."""
    source, target = scratch / "dd-source", scratch / "dd-target"
    if not source.exists():
        source.write_bytes(os.urandom(64 * MIB))
    start = time.perf_counter()
    whole, rest = divmod(size, 64 * MIB)
    with target.open("wb") as file:
        command = ["dd", f"if={source}", "bs=4M", "status=none"]
        for _ in range(whole):
            subprocess.run(command, stdout=file, check=True)
        if rest:
            tail = [*command[:2], f"bs={rest}", "count=1", "status=none"]
            subprocess.run(tail, stdout=file, check=True)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _export(run: Path, out: Path) -> float:
    """Seconds that the export itself takes, in a process that has imported what it needs."""
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from megatron_moe.commands.export import export_checkpoint\n"
        "start = time.perf_counter()\n"
        "export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(time.perf_counter() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(run), str(out)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def _save_process(about: dict[str, Any]) -> None:
    """In a process of its own: one rank takes steps and saves, both ways."""
    from megatron_moe.runtime import cpu

    cpu.install()
    from megatron_moe.runtime.world import run_local_ranks

    out = Path(about["scratch"]) / "saved.json"
    run_local_ranks(lambda world: _save_rank(world, about, out), ranks=1, device="cpu")
    print(out.read_text())


def _save_rank(world: Any, about: dict[str, Any], out: Path) -> None:
    from megatron_moe.checkpoint.sharded import Saver

    configs = {kind: _save_config(about, kind) for kind in ("sync", "async")}
    step, state, groups = _stepping(world, configs["sync"])
    output: dict[str, list[float]] = {name: [] for name in SAVE_TIMES}

    def book(name: str, seconds: float) -> None:
        output[name].append(seconds)
        say(f"startup, save: {name} {seconds:.2f} s")

    savers = {kind: Saver(configs[kind], plan_hash="bench", say=lambda _: None) for kind in configs}
    with savers["sync"] as sync, savers["async"] as beside:
        for _ in range(about["rounds"]):
            book("step", min(step() for _ in range(2)))
            book("save", _seconds(lambda: sync.save(state, groups)))
            size = _size(configs["sync"].run.dir)
            book("dd", dd(Path(about["scratch"]), size))
            book("async save returns after", _seconds(lambda: beside.save(state, groups)))
            during, waited = _steps_beside(step, beside)
            book("async save holds an update up for", waited)
            book("wait for it afterwards", _seconds(beside.wait))
            book("steps beside it, longer by", sum(during) - 2 * output["step"][-1])
    out.write_text(json.dumps(_save_record(output, size)))


def _steps_beside(step: Callable[..., float], saver: Any) -> tuple[list[float], float]:
    """Seconds of two steps while a save is being written, and how long it held updates up."""
    waits: list[float] = []
    during = [step(lambda: waits.append(_seconds(saver.before_update))) for _ in range(2)]
    return during, sum(waits)


SAVE_TIMES = (
    "step", "save", "dd", "async save returns after", "async save holds an update up for",
    "wait for it afterwards", "steps beside it, longer by",
)  # fmt: skip


def _save_config(about: dict[str, Any], kind: str) -> Any:
    from megatron_moe.config.load import load
    from megatron_moe.config.run import RunConfig

    scratch = Path(about["scratch"])
    file = _settings(scratch, Path(about["dense"]), Path(about["tokens"]),
                     scratch / f"run-{kind}", kind == "async")  # fmt: skip
    config = load(RunConfig, file)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    return config


def _stepping(world: Any, config: Any) -> tuple[Callable[..., float], Any, Any]:
    """A function that takes a step and says its seconds, after the first; its state and groups."""
    from megatron_moe.bench.build import make_supply, make_timed_state
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.guard import StepGuard
    from megatron_moe.train.step import train_step

    layout, groups = create_groups(config.parallel, seed=0)
    state = make_timed_state(config, world, layout, groups, random=True, balanced=False)
    batches = make_supply(config, state.model.spec, groups, random=True)(state)
    guard = StepGuard(config.guard)

    def step(before_update: Callable[[], object] = lambda: None) -> float:
        def at(stage: str) -> None:
            if stage == "optimizer":
                before_update()

        return _seconds(lambda: train_step(state, batches, config, groups, guard=guard, at=at))

    step()
    return step, state, groups


def _save_record(output: dict[str, list[float]], size: int) -> dict[str, Any]:
    held = zip(
        output["async save returns after"], output["async save holds an update up for"], strict=True
    )
    stalled = [sum(both) for both in held]
    longer = output["steps beside it, longer by"]
    lost = [
        a + max(0.0, b) for a, b in zip(output["async save returns after"], longer, strict=True)
    ]
    return {
        "mib": round(size / MIB, 1),
        "seconds": {name: spread_of(values) for name, values in output.items()},
        "over_dd": ratios(output["save"], output["dd"]),
        "target_over_dd": 1.5,
        "async_stall_over_save": ratios(stalled, output["save"]),
        "async_all_over_save": ratios(lost, output["save"]),
        "target_async_over_save": 0.05,
    }


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.distcp"))


def _settings(
    scratch: Path, dense: Path, tokens: Path, run: Path, async_save: bool = False
) -> Path:
    settings = {
        "run": {"dir": str(run), "device": "cpu"},
        "source": {"path": str(dense)},
        "moe": {"num_moe_experts": 8},
        "upcycle": {"verify": "never"},
        "data": {"path": str(tokens), "seq_length": 64},
        "train": {"steps": 2, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"warmup_steps": 0},
        "checkpoint": {"async_save": async_save, "keep": 1},
        "log": {"tensorboard": False},
    }
    file = scratch / f"{run.name}.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def _write_tokens(prefix: Path, *, vocab_size: int) -> None:
    from megatron_moe.runtime import cpu

    cpu.install()
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(20):
        builder.add_document(torch.randint(0, vocab_size, (300,)), [300])
    builder.finalize(f"{prefix}.idx")


def _has_step(file: Path, step: int) -> bool:
    if not file.exists():
        return False
    lines = file.read_text().splitlines()
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))


def _timed(name: str, command: list[str], rounds: int, *, fails: bool = False) -> dict[str, Any]:
    """Time a command that ends well, or one whose answer is an error."""
    seconds, busy = [], []
    for number in range(rounds + 1):
        start, before = time.perf_counter(), _children_seconds()
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL if fails else None}
        status = subprocess.run(command, **silent, cwd=ROOT).returncode
        if status != (2 if fails else 0):
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
        seconds.append(time.perf_counter() - start)
        busy.append(_children_seconds() - before)
        say(f"startup, {name}, {number}/{rounds}: {seconds[-1]:.2f} s, {busy[-1]:.2f} CPU s")
    return {
        "first_seconds": round(seconds[0], 3),
        "seconds": spread_of(seconds[1:]),
        "cpu_seconds": spread_of(busy[1:]),
    }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _imports(command: list[str]) -> dict[str, Any]:
    """Whether torch was imported, and what took longest, in seconds of its own."""
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True, cwd=ROOT
    )
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", done.stderr)
    own: dict[str, int] = {}
    for micro, module in rows:
        package = module.split(".")[0]
        own[package] = own.get(package, 0) + int(micro)
    slowest = sorted(own.items(), key=lambda item: -item[1])[:6]
    return {
        "imported": "torch" in own,
        "slowest": {name: round(micro / 1e6, 3) for name, micro in slowest},
    }


if __name__ == "__main__":
    main()
