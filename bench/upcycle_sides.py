#!/usr/bin/env python3
"""One way to fill one rank's parameters, in a forked process of its own: seconds, memory, bytes.

Each side stands for one rank of the job (`runtime/stand_in.py`): groups of the fake backend, real
memory. Nobody needs another rank to fill its own parameters, so one process shows what each of
them does. What is timed begins with the files open and ends with every parameter filled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from workers import forked, serve, subjects, take_pipes

from megatron_moe.runtime import cpu
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.stand_in import simulated_rank

cpu.install()

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.groups import create_groups
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.runtime.memory import held_bytes, peak_bytes, reset_peak

Measured = dict[str, Any]


def settings(about: dict[str, Any]) -> RunConfig:
    """The run that the rank belongs to."""
    return build(
        RunConfig,
        {
            "run": {"dir": "none", "device": "cpu"},
            "source": {"path": about["dense"]},
            "data": {"path": "none", "seq_length": 512},
            "train": {"steps": 1, "precision": about.get("precision", "bf16")},
            "moe": about["moe"],
            "upcycle": about.get("upcycle", {}),
            "parallel": about.get("parallel", {}),
        },
    )


def ours(config: RunConfig, rank: int) -> Measured:
    """`model.upcycle.upcycle` into a model just built."""
    layout, groups = create_groups(config.parallel, seed=0)
    held, start = _begin()
    dense = open_safetensors(config.source.path)
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    opened = time.perf_counter() - start
    model = _empty(config, dense.spec, layout, groups, rank)
    start, busy = time.perf_counter(), time.process_time()
    filled = upcycle(model, dense, plan, layout=layout, rank=rank)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    sources = {name for _, name in filled.sources}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "open_seconds": opened,
        "peak_bytes": peak_bytes() - held,
        "parameter_bytes": filled.parameter_bytes,
        "bytes_read": filled.bytes_read,
        "tensors": len(sources),
        "source_bytes": dense.source_bytes,
        "bytes_of_its_tensors": sum(dense.tensors[name].num_bytes for name in sources),
    }


def copying(config: RunConfig, rank: int) -> Measured:
    """Copy the shard's number of bytes from the file's pages into the same parameters."""
    layout, groups = create_groups(config.parallel, seed=0)
    held, _ = _begin()
    dense = open_safetensors(config.source.path)
    model = _empty(config, dense.spec, layout, groups, rank)
    files = sorted({info.file for info in dense.tensors.values()})
    start, busy, total = time.perf_counter(), time.process_time(), 0
    file, number = files[0].open("rb", buffering=0), 0
    for module in model.modules:
        for parameter in module.parameters():
            into = memoryview(parameter.detach().view(-1).view(torch.uint8).numpy())
            total += len(into)
            while into:
                if not (count := file.readinto(into)):  # from the beginning, or the next file
                    number = (number + 1) % len(files)
                    file = files[number].open("rb", buffering=0)
                into = into[count:]
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "peak_bytes": peak_bytes() - held,
        "parameter_bytes": total,
    }


def transformers(config: RunConfig, rank: int) -> Measured:
    """The dense model by from_pretrained, a state dict of the whole MoE, the rank's part of it."""
    held, start = _begin()
    busy = time.process_time()
    dense = LlamaForCausalLM.from_pretrained(config.source.path, dtype=torch.bfloat16)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in dense.state_dict().items():
        before, result, after = name.partition(".mlp.")
        for expert in range(config.moe.num_moe_experts) if result else (None,):
            key = name if expert is None else f"{before}.mlp.experts.{expert}.{after}"
            state[key] = tensor.clone()
    mine = range(config.moe.num_moe_experts)[rank :: config.parallel.expert_parallel_size]
    part = {
        name: torch.empty_like(tensor).copy_(tensor)
        for name, tensor in state.items()
        if ".experts." not in name or int(name.split(".")[5]) in mine
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in part.values())
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "peak_bytes": peak_bytes() - held,
        "parameter_bytes": size,
    }


def megatron(config: RunConfig, rank: int) -> Measured:
    """`upcycle_state_dict` between Megatron-Core's dense and MoE models, then load_state_dict.

    It wants the dense model alive: that is filled from the same folder, by name.
    """
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    layout, groups = create_groups(config.parallel, seed=0)
    checkpoint = open_safetensors(config.source.path)
    held, start = _begin()
    busy = time.process_time()
    dense = _megatron_dense(config, checkpoint.spec, groups)
    _fill_dense(dense, config.source.path, checkpoint.spec)
    filled = time.perf_counter()
    model = _empty(config, checkpoint.spec, layout, groups, rank)
    state = upcycle_state_dict(model.modules, [dense])
    # Without Transformer Engine the norm before the experts keeps its name, and is copied by it.
    model.modules[0].load_state_dict(state["model"], strict=False)
    ended = time.perf_counter()
    size = sum(p.numel() * p.element_size() for p in model.modules[0].parameters())
    return {
        "seconds": ended - start,
        "cpu_seconds": time.process_time() - busy,
        "conversion_seconds": ended - filled,
        "peak_bytes": peak_bytes() - held,
        "parameter_bytes": size,
    }


def _megatron_dense(config: RunConfig, spec: ModelSpec, groups: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_moe.model.config import transformer_config

    output = transformer_config(config, spec, engine=TORCH_ON_CPU)
    dense = replace(
        output,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        moe_layer_freq=1,
        expert_model_parallel_size=1,
    )
    return GPTModel(
        config=dense,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=spec.vocab_size,
        max_sequence_length=512,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        pg_collection=groups,
    )


@torch.no_grad()
def _fill_dense(model: Any, folder: Path, spec: ModelSpec) -> None:
    """The folder's tensors by name; rows of QKV in any order, which costs the same."""
    source = load_file(folder / "model.safetensors")
    of = {
        "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "linear_proj": ("self_attn.o_proj",),
        "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "linear_fc2": ("mlp.down_proj",),
        "input_layernorm": ("input_layernorm",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "word_embeddings": ("model.embed_tokens",),
        "output_layer": ("lm_head",),
        "final_layernorm": ("model.norm",),
    }
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        layer = f"model.layers.{parts[2]}." if parts[1] == "layers" else ""
        names = [f"{layer}{one}.weight" for one in of[parts[-2]]]
        parameter.copy_(torch.cat([source[one] for one in names]))


def _empty(
    config: RunConfig, spec: ModelSpec, layout: ParallelLayout, groups: Any, rank: int
) -> Model:
    return build_model(config, spec, layout=layout, groups=groups, rank=rank, engine=TORCH_ON_CPU)


def _begin() -> tuple[int, float]:
    reset_peak()
    return held_bytes(), time.perf_counter()


SIDES: dict[str, Callable[[RunConfig, int], Measured]] = {
    "ours": ours, "copying": copying, "transformers": transformers, "megatron": megatron,
}  # fmt: skip


def main() -> None:
    """Measure what it is told, each in a process of its own."""
    pipes = take_pipes()
    for about in subjects(pipes):
        forked(partial(serve, partial(measure, about), pipes, {}))


def measure(about: dict[str, Any], _: dict[str, Any]) -> Measured:
    """Measure one side on its simulated rank."""
    with simulated_rank(about["rank"], world_size=about["world_size"]):
        return SIDES[about["side"]](settings(about), about["rank"])


if __name__ == "__main__":
    main()
