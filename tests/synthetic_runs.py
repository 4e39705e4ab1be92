"""A run of a thousand steps and 128 experts as its files hold it, made of random numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HOSTILE = "<script>alert('x')</script>"
DOMAINS = ("commoncrawl", HOSTILE, '"><img src=x onerror=alert(1)>', "$\\frac$ _a & b", "github")
DENSE = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 512,
    "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8,
    "vocab_size": 1000,
}  # fmt: skip
TOPK = 8


def write_run(
    folder: Path,
    *,
    steps: int = 1000,
    layers: int = 32,
    experts: int = 128,
    name: str = "run",
    seed: int = 0,
) -> Path:
    """Everything that `train`, `evaluate` and `analyze` leave of a run, without its weights."""
    random = np.random.default_rng(seed)
    shape = (layers, experts)
    run = folder / name
    run.mkdir(parents=True)
    dense = folder / "dense"
    dense.mkdir(exist_ok=True)
    (dense / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": layers}))
    (run / "config.yaml").write_text(yaml.safe_dump(_settings(run, dense, steps, seed, experts)))
    (run / "receipt.json").write_text(json.dumps(_receipt(world_size=16)))
    lines = [{"step": 0, **_validation(random, 0)}] + [
        _line(random, step, steps, shape) for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (steps // 2, steps):
        _write(run / "analysis" / f"step-{step:08d}.json", analysis(random, step, *shape))
        _write(run / "evaluation" / f"step-{step:08d}.json", evaluation(random, step))
    return run


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def _settings(run: Path, dense: Path, steps: int, seed: int, experts: int) -> dict[str, Any]:
    domains = {name: {"path": "data/x", "weight": 1 / len(DOMAINS)} for name in DOMAINS}
    return {
        "run": {"dir": str(run), "device": "cpu", "seed": seed},
        "source": {"path": str(dense)},
        "moe": {"num_moe_experts": experts, "moe_router_topk": TOPK},
        "parallel": {
            "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 4,
        },
        "data": {"domains": domains, "validation_fraction": 0.1},
        "train": {"steps": steps, "global_batch_size": 64},
    }  # fmt: skip


def _validation(random: np.random.Generator, step: int) -> dict[str, float]:
    each = {
        f"loss/validation/{name}": 2 + i / 5 + 1.5 / (1 + step / 100) + random.normal(0, 0.01)
        for i, name in enumerate(DOMAINS)
    }
    return {"loss/validation": float(np.mean([*each.values()])), **each}


def _line(
    random: np.random.Generator, step: int, steps: int, shape: tuple[int, int]
) -> dict[str, Any]:
    layers, experts = shape
    loads_LE = random.gamma(4, 0.25, shape)
    loads_LE *= np.linspace(0.3, 3, experts) ** np.linspace(0, 1, layers)[:, None]
    loads_LE /= loads_LE.mean(axis=1, keepdims=True)
    drops_L = np.clip(random.normal(0.02, 0.01, layers), 0, 1)
    weights = np.exp(np.arange(len(DOMAINS)) * step / steps / 3)
    entropy_L = random.normal(4.5, 0.05, layers) - np.linspace(0, step / steps, layers)
    moving = {
        f"mixing/{kind}/{name}": float(weights[i] / weights.sum()) * (step / 300 if last else 1)
        for kind, last in (("weight", False), ("share", False), ("epochs", True))
        for i, name in enumerate(DOMAINS)
    }
    numbers = {
        "step": step,
        "loss/lm": 2.4 + 1.5 / (1 + step / 100) + random.normal(0, 0.05) + (step == 500) * 4,
        "loss/load_balancing": 1 + abs(random.normal(0.05, 0.02)),
        "loss/router_z": 3 + random.normal(0, 0.1),
        "grad_norm": float(np.exp(random.normal(0, 0.3))),
        "skipped": float(step in (501, 502)),
        "learning_rate": 3e-5 * min(step / 100, 0.5 + 0.5 * np.cos(np.pi * step / steps)),
        "router/load_imbalance": float(loads_LE.max(axis=1).mean()),
        "router/entropy": float(entropy_L.mean()),
        "router/drop_rate": float(drops_L.mean()),
        "router/load_imbalance_by_layer": loads_LE.max(axis=1).round(6).tolist(),
        "router/entropy_by_layer": entropy_L.round(6).tolist(),
        "router/drop_rate_by_layer": drops_L.round(6).tolist(),
        "throughput/tokens_per_second_per_gpu": random.normal(9000, 200),
        "throughput/tflops_per_gpu": 400.0,
        "throughput/mfu": random.normal(0.4, 0.01),
        "throughput/mfu_full_attention": random.normal(0.45, 0.01),
        "memory/peak_gib": 60.0,
        "time/step_seconds": random.normal(3, 0.05),
        "time/data_seconds": 0.002,
        "tokens/seen": step * 64 * 2048,
        **moving,
    }
    if step in (1, steps) or step % max(1, steps // 100) == 0:
        numbers["router/load_by_expert"] = loads_LE.round(3).tolist()
    return numbers | (_validation(random, step) if step % 100 == 0 else {})


def _receipt(world_size: int) -> dict[str, Any]:
    ranks = [
        {"rank": rank, "parameters": 100, "parameter_bytes": 2**30, "bytes_read": 2**29,
         "held_bytes_before": 2**20, "peak_bytes": 2**31, "seconds": 12.5}
        for rank in range(world_size)
    ]  # fmt: skip
    return {
        "method": "copy", "plan_hash": "0123456789abcdef", "tensors_covered": 291,
        "source_bytes": 2**34, "bytes_read": 2**33, "seconds": 12.5,
        "verification": {"max_logit_error": 2e-4, "argmax_agreement": 1.0, "tokens": 128},
        "against_dense": None, "ranks": ranks,
    }  # fmt: skip


def evaluation(random: np.random.Generator, step: int) -> dict[str, Any]:
    def judged(shift: float) -> dict[str, Any]:
        losses = {name: 2 + i / 5 + shift for i, name in enumerate(DOMAINS)}
        return {
            name: {"tokens": 65536, "bytes": 262144, "loss": loss,
                   "perplexity": float(np.exp(loss)), "bits_per_byte": loss / np.log(2) / 4}
            for name, loss in losses.items()
        }  # fmt: skip

    return {
        "schema": 1, "kind": "evaluation", "checkpoint": "x", "step": step, "seq_length": 2048,
        "domains": judged(-step / 2000), "dense": judged(0.01), "step_0": judged(0.01),
    }  # fmt: skip


def analysis(random: np.random.Generator, step: int, layers: int, experts: int) -> dict[str, Any]:
    tokens = 4096
    depth_L = np.linspace(0.1, 1.5, layers) * step / 1000
    counts = {}
    for name in DOMAINS:
        taste_LE = random.normal(0, 1, (layers, experts)) * depth_L[:, None]
        share_LE = np.exp(taste_LE) / np.exp(taste_LE).sum(axis=1, keepdims=True)
        counts[name] = np.stack([random.multinomial(tokens * TOPK, p) for p in share_LE]).tolist()
    share_NLE = np.array([counts[name] for name in DOMAINS]) / (tokens * TOPK)
    distance_LNN = np.sqrt(((share_NLE[:, None] - share_NLE[None]) ** 2).sum(-1)).transpose(2, 0, 1)
    together_LEE = random.integers(0, 50, (layers, experts, experts))
    cosines_LEE = random.uniform(0.5, 1, (layers, experts, experts)).round(4)
    flat = {name: [4.0 - i / 50 for i in range(layers)] for name in DOMAINS}
    return {
        "schema": 1, "kind": "analysis", "checkpoint": "x", "step": step,
        "seq_length": 2048, "evaluation_sets": [], "loss": dict.fromkeys(DOMAINS, 2.5),
        "counts_of_halves": {name: [counts[name]] * 2 for name in DOMAINS},
        "layers": [*range(layers)], "num_experts": experts, "topk": TOPK, "domains": [*DOMAINS],
        "tokens": dict.fromkeys(DOMAINS, tokens), "counts": counts,
        "dropped": {name: [0] * layers for name in DOMAINS}, "entropy": flat,
        "max_over_mean": flat, "dead": {name: [i % 3 for i in range(layers)] for name in DOMAINS},
        "confidence": flat, "coactivation": together_LEE.tolist(),
        "distances": {"layers": distance_LNN.tolist(), "mean": distance_LNN.mean(axis=0).tolist(),
                      "within": dict.fromkeys(DOMAINS, [0.01] * layers)},
        "similarity": {"between_experts": cosines_LEE.tolist(),
                       "to_dense": cosines_LEE[:, 0].tolist()},
    }  # fmt: skip
