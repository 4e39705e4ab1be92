"""Compare growing a MoE half way with training the larger MoE from the start.

    dense --> E8,  N steps --> keep, or grow to E16 (noise, load, utility, bias, exact), N steps
          --> E16, N steps --> keep, N steps

All runs of a seed see the same text in the same order: stage 1 one half, stage 2 the other. Both
stages of every run begin with an empty optimizer and a warm-up, so that runs differ in nothing but
when their experts are added. The results go to docs/growing.json. About an hour on one core; after
an interruption, run the same command to resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from megatron_moe.runtime import cpu  # noqa: E402

cpu.install()  # before Megatron-Core is imported

import torch  # noqa: E402
from folders import complete_or_absent  # noqa: E402
from get_text import get_text  # noqa: E402
from package_index import default_cache  # noqa: E402

from megatron_moe.commands.export import export_checkpoint  # noqa: E402
from megatron_moe.config.moe import Moe  # noqa: E402
from megatron_moe.data.corpus import tokenize_files  # noqa: E402
from megatron_moe.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_moe.errors import UserError  # noqa: E402
from megatron_moe.experts.from_source import complete_from_source  # noqa: E402
from megatron_moe.hf.spec import ModelSpec, read_spec  # noqa: E402
from megatron_moe.planner.flops import forward_flops, training_flops  # noqa: E402
from megatron_moe.planner.shape import upcycled_shape  # noqa: E402
from research.study.inputs import (  # noqa: E402
    dense_of_one_expert,
    random_dense,
    train_tokenizer,
)
from research.study.jobs import Job, do_all  # noqa: E402
from research.study.page import provenance, to_json  # noqa: E402
from research.study.runs import (  # noqa: E402
    BATCH,
    SEQ_LENGTH,
    STEP_TOKENS,
    Training,
    collect,
    dense_run,
    train_run,
    write_result,
)

HERE, TEXT = ROOT / "runs" / "growing", ROOT / "runs" / "text"
TEXTS, TOKENS, MODELS, RESULTS = (HERE / p for p in ("texts", "tokens", "models", "results"))
KINDS = ("code", "wiki")
PARTS = {"pretrain": (0, 2), "first": (1,), "second": (3,)}
"""Documents of each part, by their number modulo 4."""
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
PRETRAIN = Training(steps=600, lr=3e-3, warmup_steps=40)
STEPS, WARMUP, LR = 120, 8, 1e-3
SEEDS = (0, 1, 2)
HELD_OUT = 64
"""Held-out sequences of each kind of text."""


@dataclass(frozen=True, slots=True)
class First:
    """A MoE that stage 1 builds from the dense model and trains."""

    experts: int
    topk: int

    @property
    def name(self) -> str:
        """Name in paths and tables."""
        return f"E{self.experts} K{self.topk}"


E8, E16, E16_K4 = First(8, 2), First(16, 2), First(16, 4)


@dataclass(frozen=True, slots=True)
class Case:
    """One way through both stages."""

    name: str
    first: First
    upcycle: dict[str, Any] = field(default_factory=lambda: {"method": "keep"})
    experts: int = 16
    topk: int = 2
    flops_of: First | None = None
    """Train stage 2 until the run has used the FLOPs of this MoE in both stages; None takes as many
    tokens as all others."""

    @property
    def file_name(self) -> str:
        """The case's name for use in paths."""
        return self.name.replace(", ", "--").replace(" ", "-")


def _grow(name: str, *, topk: int = 2, flops_of: First | None = None, **upcycle: Any) -> Case:
    return Case(name, E8, {"method": "grow", **upcycle}, topk=topk, flops_of=flops_of)


CASES = (
    Case("8 experts", E8, experts=8),
    Case("16 from the start", E16),
    _grow("noise"),
    _grow("load", choose="load"),
    _grow("utility", choose="utility"),
    _grow("bias", twins="bias"),
    Case("16 top-4 from the start", E16_K4, topk=4),
    _grow("exact", topk=4, twins="exact"),
    _grow("exact, FLOPs of top-2", topk=4, flops_of=E16, twins="exact"),
    _grow("exact, FLOPs of top-4", topk=4, flops_of=E16_K4, twins="exact"),
)


def main() -> None:
    """Run all jobs without a result, and write docs/growing.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="output folder")
    parser.add_argument("--minutes", type=float, help="start no job after this many minutes")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    until = None if args.minutes is None else time.time() + 60 * args.minutes
    made = provenance()  # the code that runs is that of the start
    try:
        for jobs in (prepare(), trainings()):
            do_all(jobs, workers=args.workers, logs=HERE / "logs", until=until)
        (args.out / "growing.json").write_text(to_json(made | gathered()))
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def prepare() -> list[Job]:
    """Return the jobs that make texts, tokens and the dense model."""
    text, dense = TEXT / "train.jsonl", MODELS / "dense"
    return [
        Job("text", text, partial(get_text, TEXT, offline=False, cache=default_cache())),
        Job("texts", TEXTS, write_texts, needs=(text,)),
        Job("tokens", TOKENS, write_tokens, needs=(TEXTS,)),
        Job("dense", dense, train_dense, needs=(TOKENS,)),
    ]


def write_texts() -> None:
    """Write each part of each kind of text, and a tokenizer for them."""
    documents = [json.loads(line) for line in (TEXT / "train.jsonl").open(encoding="utf-8")]
    with complete_or_absent(TEXTS) as staging:
        for kind in KINDS:
            chosen = [d for d in documents if d["source"].startswith(kind)]
            for part, numbers in PARTS.items():
                path = staging / part / f"{kind}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(d) for i, d in enumerate(chosen) if i % 4 in numbers]
                path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        train_tokenizer(staging / "pretrain", staging / "tokenizer")


def write_tokens() -> None:
    """Write the tokens of all texts."""
    tokenizer = load_tokenizer(TEXTS / "tokenizer")
    with complete_or_absent(TOKENS) as staging:
        for part in PARTS:
            (staging / part).mkdir()
            for kind in KINDS:
                tokenize_files([TEXTS / part / f"{kind}.jsonl"], staging / part / kind, tokenizer)


def train_dense() -> None:
    """Train the dense model that all runs start from."""
    random, run = MODELS / "random", HERE / "runs" / "dense"
    random_dense(TEXTS / "tokenizer", random, seed=0, shape=SHAPE)
    train_run(dense_run(run, random, TOKENS / "pretrain", PRETRAIN, domains=KINDS))
    write_result(RESULTS / "dense.json", collect(run / "metrics.jsonl"))
    dense_of_one_expert(run, random, MODELS / "dense")


def trainings() -> list[Job]:
    """Return the jobs of both stages, seed by seed."""
    result = []
    for seed in SEEDS:
        for first in (E8, E16, E16_K4):
            out = MODELS / f"{first.name.replace(' ', '-')}-seed{seed}"
            result.append(Job(out.name, out, partial(train_first, first, seed, out)))
            for case in CASES:
                if case.first == first:
                    path = RESULTS / f"{case.file_name}-seed{seed}.json"
                    work = partial(train_second, case, seed, out, path)
                    result.append(Job(path.stem, path, work, needs=(out,)))
    return result


def train_first(first: First, seed: int, out: Path) -> None:
    """Build a MoE from the dense model, train it at a constant rate, and export it."""
    run = HERE / "runs" / out.name
    tree = settings(run, MODELS / "dense", "first", STEPS, seed)
    tree["moe"] = {"num_moe_experts": first.experts, "moe_router_topk": first.topk}
    tree["upcycle"] |= {"method": "copy"}
    tree["optimizer"] |= {"lr_decay_style": "constant"}
    train_run(tree)
    write_result(RESULTS / f"stage1-{out.name}.json", collect(run / "metrics.jsonl"))
    with complete_or_absent(out) as staging:
        export_checkpoint(run, staging)
    shutil.rmtree(run / "checkpoints")


def train_second(case: Case, seed: int, source: Path, result: Path) -> None:
    """Keep or grow the MoE of stage 1, and train it on the other text with a decaying rate."""
    run, steps, start = HERE / "runs" / result.stem, steps_of(case), time.monotonic()
    tree = settings(run, source, "second", steps, seed)
    tree["moe"] = {"num_moe_experts": case.experts, "moe_router_topk": case.topk}
    tree["upcycle"] |= case.upcycle
    if "choose" in case.upcycle:
        tree["upcycle"]["plan"] = str(run / "plan.safetensors")
    train_run(complete_from_source(tree))
    values = {
        "case": case.name, "seed": seed, "tokens": (STEPS + steps) * STEP_TOKENS,
        "teraflops": round(total_flops(case) / 1e12, 3), **collect(run / "metrics.jsonl"),
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    write_result(result, values)
    shutil.rmtree(run / "checkpoints")


def settings(run: Path, source: Path, part: str, steps: int, seed: int) -> dict[str, Any]:
    """Return the settings that all runs of a stage have in common."""
    how = Training(steps=steps, lr=LR, warmup_steps=WARMUP)
    tree = dense_run(run, source, TOKENS / part, how, domains=KINDS)
    tree["run"]["seed"] = seed
    tree["upcycle"] = {"seed": seed, "verify": "never"}
    tree["measure"] = {"samples": 128}
    tree["data"]["validation_samples"] = HELD_OUT
    tree["log"] |= {"router_warning_steps": steps}
    return tree


def flops(experts: int, topk: int) -> int:
    """Return the FLOPs of one training step with the router's, forward and backward."""
    spec: ModelSpec = read_spec(MODELS / "dense")
    moe = Moe(num_moe_experts=experts, moe_router_topk=topk)
    forward = forward_flops(
        upcycled_shape(spec, moe), sequence_length=SEQ_LENGTH, batch_size=BATCH, causal=True
    )
    return training_flops(forward.model + forward.router)


def steps_of(case: Case) -> int:
    """Return the steps of stage 2."""
    if case.flops_of is None:
        return STEPS
    wanted = 2 * STEPS * flops(case.flops_of.experts, case.flops_of.topk)
    left = wanted - STEPS * flops(case.first.experts, case.first.topk)
    return round(left / flops(case.experts, case.topk))


def total_flops(case: Case) -> int:
    """Return the FLOPs of both stages."""
    before = STEPS * flops(case.first.experts, case.first.topk)
    return before + steps_of(case) * flops(case.experts, case.topk)


def gathered() -> dict[str, Any]:
    """Collect the results of all runs, in the order of the cases.

    Raises:
        UserError: There are no results.
    """
    names = [case.name for case in CASES]
    runs = [
        json.loads(path.read_text())
        for case in CASES
        for path in RESULTS.glob(f"{case.file_name}-seed?.json")
    ]
    if not runs:
        raise UserError(f"{RESULTS} contains no results yet.\n  run python -m research.growing")
    return {
        "held_out_tokens": len(KINDS) * HELD_OUT * SEQ_LENGTH,
        "dense": json.loads((RESULTS / "dense.json").read_text()),
        "runs": sorted(runs, key=lambda run: (names.index(run["case"]), run["seed"])),
    }


if __name__ == "__main__":
    main()
