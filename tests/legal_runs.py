"""A legal configuration for one rank and its dense model, to break rules with."""

from typing import Any

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec, spec_from_config

LAYERS, HEADS, GROUPS, FFN, MAX_LENGTH = 12, 12, 6, 48, 256


def make_spec(**changes: Any) -> ModelSpec:
    dense = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": 48,
        "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "vocab_size": 100, "max_position_embeddings": MAX_LENGTH,
    }  # fmt: skip
    return spec_from_config(dense | changes)


def make_config(changes: dict[str, Any] | None = None) -> RunConfig:
    """Return a legal configuration for one rank, with changes by ``section.key``."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "run"},
        "source": {"path": "dense"},
        "moe": {"num_moe_experts": 8},
        "parallel": {},
        "upcycle": {},
        "data": {"path": "text", "seq_length": 48},
        "train": {"steps": 10, "global_batch_size": 48},
        "optimizer": {"warmup_steps": 2},
        "guard": {},
        "checkpoint": {},
        "teacher": {},
        "lora": {},
    }
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        tree[section][key] = value
    return build(RunConfig, tree)


def parallel(**degrees: int) -> dict[str, int]:
    """Return settings for tp, cp, pp, vpp, ep and etp."""
    names = {
        "tp": "tensor", "cp": "context", "pp": "pipeline", "vpp": "virtual_pipeline",
        "ep": "expert", "etp": "expert_tensor",
    }  # fmt: skip
    return {f"parallel.{names[short]}_parallel_size": size for short, size in degrees.items()}


def domains(**weights: float | None) -> dict[str, Any]:
    """Return settings for named domains instead of one text."""
    named = {name: {"path": name, "weight": weight} for name, weight in weights.items()}
    return {"data.path": None, "data.domains": named}
