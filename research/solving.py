"""Compare what is solved for, on SmolLM2-135M before any training step; write docs/solving.json.

Splits the FFNs into 8 experts in several ways, solves for routers and down matrices on the demo's
training text, and judges each model on held-out text of the same kind, on C++ headers and on
licenses, none of which is in the calibration text. Each case takes about 13 minutes of one core
(32,768 tokens); a case that has a result is skipped. Needs the model and text of `make demo`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_moe.commands.construct import construct
from megatron_moe.commands.train import train
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.markdown import markdown_table
from research.study.runs import collect, on_one_thread, write_result

MODEL, TEXT = Path("runs/models/smollm2-135m"), Path("runs/text")
DOCS = Path(__file__).resolve().parents[1] / "docs"
SEQ_LENGTH, HELD_OUT = 512, 16
BOTH = ["router", "down"]
QUARTER = {"moe_router_topk": 2, "moe_ffn_hidden_size": 192}
SHARED = {
    "moe_router_topk": 2, "moe_ffn_hidden_size": 144, "moe_shared_expert_intermediate_size": 384,
}  # fmt: skip
HALF = {"moe_router_topk": 4, "moe_ffn_hidden_size": 192}
COPIES = {"num_moe_experts": 2, "moe_router_topk": 2}
COACTIVE = {"method": "split_coactivation", "fit": BOTH}
SOLVED = {"method": "split_routed", "fit": BOTH}
FREE = {"max_load": 8.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "dense": (COPIES, {"method": "copy"}, 0),
    "25%, random, N/K": (QUARTER, {"method": "split_random", "rescale": "N/K"}, 0),
    "25%, both": (QUARTER, SOLVED, 64),
    "25%, both, no bound": (QUARTER, SOLVED | FREE, 64),
    "44%, both": (SHARED, SOLVED, 64),
    "50%, both": (HALF, SOLVED, 64),
    "25%, coactivation, both": (QUARTER, COACTIVE, 64),
    "25%, coactivation, both, no bound": (QUARTER, COACTIVE | FREE, 64),
    "44%, coactivation, both": (SHARED, COACTIVE, 64),
    "25%, router": (QUARTER, SOLVED | {"fit": ["router"]}, 64),
    "25%, coactivation, down": (QUARTER, COACTIVE | {"fit": ["down"]}, 64),
    "25%, coactivation, N/K": (QUARTER, COACTIVE | {"fit": []}, 64),
    "25%, both, 4k tokens": (QUARTER, SOLVED, 8),
    "25%, both, 8k tokens": (QUARTER, SOLVED, 16),
    "25%, both, 8k tokens, seed 1": (QUARTER, SOLVED | {"seed": 1}, 16),
    "25%, both, 8k tokens, seed 2": (QUARTER, SOLVED | {"seed": 2}, 16),
    "25%, both, 8k tokens, stream 0.3": (QUARTER, SOLVED | {"fit_stream": 0.3}, 16),
    "25%, both, 8k tokens, stream 1": (QUARTER, SOLVED | {"fit_stream": 1.0}, 16),
    "25%, both, 128k tokens": (QUARTER, SOLVED, 256),
}
"""Settings of the experts and of their construction, and sequences of calibration, by name."""


def main() -> None:
    """Judge every case that has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for texts, plans and results")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names in CASES (all)")
    chosen = parser.parse_args()
    if unknown := set(chosen.cases) - set(CASES):
        parser.error(f"unknown case {sorted(unknown)}; known: {list(CASES)}")
    if not (MODEL / "config.json").exists() or not (TEXT / "train.jsonl").exists():
        parser.error(f"{MODEL} or {TEXT} is missing; make demo gets both")
    out: Path = chosen.out
    other = other_texts(out)
    for name in chosen.cases or CASES:
        moe, upcycle, samples = CASES[name]
        result = out / f"{name.replace(', ', '-').replace(' ', '-').replace('/', '')}.json"
        if not result.exists():
            values = judge(out, moe, upcycle, samples, other)
            write_result(result, {"case": name, **values})
        print(json.dumps(json.loads(result.read_text())), flush=True)
    results = {one["case"]: one for one in map(_read, sorted(out.glob("*.json")))}
    lines = ",\n".join(json.dumps(results[name]) for name in CASES if name in results)
    (DOCS / "solving.json").write_text(f"[\n{lines}\n]\n")


def other_texts(out: Path) -> dict[str, Path]:
    """Write texts of kinds that are not in the calibration text, and return them by name."""
    include = Path(torch.__file__).parent / "include" / "ATen" / "core"
    packages = Path(sysconfig.get_paths()["purelib"])
    files = {
        "C++ headers": sorted(include.glob("*.h")),
        "licenses": sorted(packages.glob("*.dist-info/**/LICENSE*")),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, chosen in files.items():
        path = out / f"{name.replace(' ', '-')}.jsonl"
        texts = [
            file.read_text(encoding="utf-8", errors="replace") for file in chosen if file.is_file()
        ]
        kept = sorted({text for text in texts if len(text) > 500})[:60]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
        paths[name] = path
    return paths


def judge(
    out: Path, moe: dict[str, Any], upcycle: dict[str, Any], samples: int, other: dict[str, Path],
) -> dict[str, Any]:  # fmt: skip
    """Construct one case and return its held-out losses, loads, errors and seconds."""
    run, plan = out / "run", out / "run" / "plan.safetensors"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    tree = settings(run, moe, upcycle, samples)
    measured: dict[str, Any] = {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if samples:
        tree["upcycle"]["plan"] = str(plan)
        on_one_thread(partial(construct, build(RunConfig, tree)))
        with safe_open(plan, "pt") as file:
            metadata = file.metadata()
        measured = json.loads(metadata["megatron_moe.expert_plan"])["measured_on"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tree["data"] = judged_data(other)
    on_one_thread(partial(train, build(RunConfig, tree)))
    fits = measured.get("fit", {})
    return {
        **collect(run / "metrics.jsonl"),
        "tokens": samples * SEQ_LENGTH,
        "max_load": max((fit["max_load"] for fit in fits.values()), default=None),
        "errors": [round(fit["error_after"], 3) for fit in fits.values()],
        "construct_cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        ),
        "construct_peak_gib": round(after.ru_maxrss / 2**20, 2) if samples else None,
    }


def settings(
    run: Path, moe: dict[str, Any], upcycle: dict[str, Any], samples: int
) -> dict[str, Any]:
    """Return the configuration of a case as in its YAML file."""
    return {
        "run": {"dir": str(run), "device": "cpu", "seed": upcycle.get("seed", 0)},
        "source": {"path": str(MODEL)},
        "moe": {"num_moe_experts": 8, **moe},
        "upcycle": {"verify": "never", **upcycle},
        "measure": {"samples": max(samples, 8), "hidden_states": 4096},
        "data": {"path": str(TEXT / "train.jsonl"), "seq_length": SEQ_LENGTH},
        "train": {"steps": 0, "micro_batch_size": 1, "global_batch_size": 1, "precision": "fp32"},
        "optimizer": {"warmup_steps": 0},
        "log": {"tensorboard": False},
    }


def judged_data(other: dict[str, Path]) -> dict[str, Any]:
    """Return the texts to judge on; calibration is over."""
    domains: dict[str, Any] = {
        "demo": {
            "path": str(TEXT / "train.jsonl"),
            "validation_path": str(TEXT / "validation.jsonl"), "weight": 1 - 2e-6,
        }
    }  # fmt: skip
    for name, path in other.items():
        domains[name] = {"path": str(path), "validation_path": str(path), "weight": 1e-6}
    return {"domains": domains, "seq_length": SEQ_LENGTH, "validation_samples": HELD_OUT}


def table(results: list[dict[str, Any]]) -> str:
    """Return all results as Markdown, with losses relative to the dense model's."""
    dense = next(one for one in results if one["case"] == "dense")["domains"]
    head, rows = ["case", "tokens", *(f"{name} (above dense)" for name in dense), "load"], []
    for one in results:
        losses = [
            f"{loss:.3f} ({loss - dense[domain]:+.3f})" for domain, loss in one["domains"].items()
        ]
        load = "" if one["max_load"] is None else f"{one['max_load']:.2f}"
        rows.append([one["case"], f"{one['tokens']:,}", *losses, load])
    return markdown_table(head, rows)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
