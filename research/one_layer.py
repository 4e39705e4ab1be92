"""Time one layer of a large model while its experts are solved for: Llama-2-7B's shape, 16 experts.

A layer of random weights has the shapes, and so the work, of a trained one. It is split into 16
experts, top-4, and router and down matrices are solved for on random tokens. Prints as JSON what
was measured and what ``construct --dry-run`` predicts for the same work. Ten to twenty minutes on
2 cores, 12 GiB of memory, 2 GB in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_moe.commands.construct import construct
from megatron_moe.commands.construct_cost import construct_cost
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.world import run_local_ranks

SHAPE: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "num_hidden_layers": 1, "vocab_size": 4096,
}  # fmt: skip
"""Llama-2-7B but for the number of layers and the vocabulary, which a fit does not read."""
EXPERTS = {"num_moe_experts": 16, "moe_router_topk": 4, "moe_ffn_hidden_size": 688}
SEQ_LENGTH = 512


def main() -> None:
    """Create the inputs once, construct, and print times and predictions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the model, the text and the plan")
    parser.add_argument("--samples", type=int, default=32, help="sequences of 512 tokens (32)")
    chosen = parser.parse_args()
    out: Path = chosen.out
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked rank would wait for the threads of this process
    create_inputs(out, chosen.samples)
    (out / "plan.safetensors").unlink(missing_ok=True)
    config = build(RunConfig, settings(out, chosen.samples))
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run_local_ranks(partial(construct, config), ranks=1, device="cpu")
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    torch.set_num_threads(threads)
    predicted = construct_cost(config, read_spec(config.source.path), 1)
    processor = sum(
        getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")
    )
    result = {
        "tokens": chosen.samples * SEQ_LENGTH,
        "minutes": round(seconds / 60, 1),
        "processor_minutes": round(processor / 60, 1),
        "peak_gib": round(after.ru_maxrss / 2**20, 1),
        "predicted_minutes": round(60 * predicted["hours"], 1),
        "predicted_gib": round(predicted["rank_bytes"] / 2**30, 1),
        "threads": threads,
    }
    print(json.dumps(result))


def create_inputs(out: Path, samples: int) -> None:
    """Write a model of one random layer, and random tokens."""
    if (out / "tokens.idx").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(out / "model")
    builder = IndexedDatasetBuilder(f"{out / 'tokens'}.bin", dtype=np.int32)
    for _ in range(samples + 1):
        tokens = torch.randint(0, SHAPE["vocab_size"], (SEQ_LENGTH + 1,))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{out / 'tokens'}.idx")


def settings(out: Path, samples: int) -> dict[str, Any]:
    """Return the configuration as in its YAML file."""
    return {
        "run": {"dir": str(out / "run"), "device": "cpu"},
        "source": {"path": str(out / "model")},
        "moe": EXPERTS,
        "upcycle": {
            "method": "split_routed", "fit": ["router", "down"],
            "plan": str(out / "plan.safetensors"), "verify": "never",
        },
        "measure": {"samples": samples, "hidden_states": 4096},
        "data": {"path": str(out / "tokens"), "seq_length": SEQ_LENGTH},
        "train": {"steps": 1, "precision": "fp32"},
        "optimizer": {"warmup_steps": 0},
    }  # fmt: skip


if __name__ == "__main__":
    main()
