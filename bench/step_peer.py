#!/usr/bin/env python3
"""The peer's side of bench/step.py: Hugging Face's MixtralForCausalLM as it is, when told to.

Attention by torch's fused kernel, fused AdamW, gradients set to None, and the experts in the mode
that is asked for. In bf16 all of it is bf16, the moments too, which costs it less than the fp32
master weights and gradients that ours keeps.

The weights are those that ours upcycles, so both must begin with the same loss.
"""

from __future__ import annotations

import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from step_cases import ADAMW, CASES, Case
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.initialization import no_init_weights
from workers import Pipes, forked, serve, subjects, take_pipes

from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.spec import ModelSpec, read_spec


def main() -> None:
    """Build a model for each subject and do as told."""
    pipes = take_pipes()
    for about in subjects(pipes):
        case, dense, folder = CASES[about["case"]], Path(about["dense"]), Path(about["folder"])
        forked(partial(measure, case, dense, folder, pipes))


def measure(case: Case, dense: Path, folder: Path, pipes: Pipes) -> None:
    """One case, until it is told to end."""
    model = mixtral(case, dense, folder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"], fused=True,
    )  # fmt: skip
    ids_BT = tokens(case, read_spec(dense).vocab_size)
    inputs_BS, labels_BS = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()

    def step(mode: str) -> dict[str, Any]:
        model.set_experts_implementation(mode)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(
            input_ids=inputs_BS, labels=labels_BS, shift_labels=labels_BS, use_cache=False
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip"])
        optimizer.step()
        result = {"loss": loss.item(), "grad_norm": norm.item()}
        return {"seconds": time.perf_counter() - start, **result}

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "step":
            return step(command["mode"])
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

    serve(answer, pipes, {"threads": torch.get_num_threads()})


def tokens(case: Case, vocab_size: int) -> Tensor:
    """The random tokens of `bench.build`."""
    length = case.seq_length + 1
    rows = [
        np.random.default_rng((0, k)).integers(vocab_size, size=length) for k in range(case.batch)
    ]
    return torch.from_numpy(np.stack(rows))


def mixtral(case: Case, dense: Path, folder: Path) -> MixtralForCausalLM:
    """The dense model copied to every expert, with the router rows that our plan has."""
    spec = read_spec(dense)
    with no_init_weights():
        model = MixtralForCausalLM(
            mixtral_config(spec, experts=case.experts, topk=case.topk, seq_length=case.seq_length)
        )
    model.tie_weights()
    model.to(OF_PRECISION[case.precision])
    model.train()
    config = case.config(dense, folder, 1)
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    _fill(model, load_file(dense / "model.safetensors"), spec, plan)
    return model


def mixtral_config(spec: ModelSpec, *, experts: int, topk: int, seq_length: int) -> MixtralConfig:
    """Return the configuration of the Mixtral that a dense model is upcycled to."""
    return MixtralConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_query_groups,
        head_dim=spec.kv_channels,
        max_position_embeddings=seq_length,
        rms_norm_eps=spec.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rotary_base},
        tie_word_embeddings=spec.tied_embeddings,
        num_local_experts=experts,
        num_experts_per_tok=topk,
        attn_implementation="sdpa",
    )


@torch.no_grad()
def _fill(model: MixtralForCausalLM, source: dict[str, Tensor], spec: ModelSpec, plan: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.copy_(torch.from_numpy(plan.layer(int(name.split(".")[2])).router_ED))
        elif name.endswith("gate_up_proj"):
            prefix = name.removesuffix("experts.gate_up_proj")
            gate, up = (source[f"{prefix}{side}_proj.weight"] for side in ("gate", "up"))
            parameter.copy_(torch.cat([gate, up]).expand_as(parameter))
        elif name.endswith("down_proj"):
            dense_name = name.replace("experts.down_proj", "down_proj.weight")
            parameter.copy_(source[dense_name].expand_as(parameter))
        else:
            parameter.copy_(source[name])
    assert spec.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)


if __name__ == "__main__":
    main()
