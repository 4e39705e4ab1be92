"""Row 1: an export states every number, so that no default of another family slips in.

Expected logits are those of transformers on the source folder. The weights of the MoE are made here
by hand: every expert is a copy of the FFN, and the router is zero, so that the MoE is the source.
1e-4 on logits of size 10: sums of fp32 in another order; a wrong default gives more than 1e-2.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, MULTIPLIERS, SHAPE, SMALL_IDS
from training_runs import run_training, tree, write_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe.commands.export import architecture_for, export_checkpoint
from megatron_moe.commands.export_config import check_export, moe_config
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.spec import read_spec

ABSENT_KEYS = (
    "rope_theta", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "head_dim",
    "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "hidden_act", "attention_dropout", "use_cache", "torch_dtype", *MULTIPLIERS,
)  # fmt: skip
"""Keys that config.json of some release of each family lacks."""

CONFIG = SHAPE | {
    # 32 heads: as many as Qwen has groups by default, and divisible by Mistral's 8.
    "num_attention_heads": 32, "hidden_size": 128, "num_key_value_heads": 16, "head_dim": 8,
    "num_hidden_layers": 2, "rope_theta": 777.0, "rms_norm_eps": 1e-2, "initializer_range": 0.2,
    "bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6, "hidden_act": "silu",
    "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "float32",
}  # fmt: skip


def write_source(folder: Path, family: str, absent: set[str]) -> dict[str, Any]:
    """Write a folder whose config.json lacks the keys ``absent``; weights fit what it means."""
    config_class, model_class = FAMILIES[family]
    if family in SMALL_IDS:
        absent = absent - {"pad_token_id"}
    stated = CONFIG | (MULTIPLIERS if family == "granite" else {})
    config = {k: v for k, v in stated.items() if k not in absent} | {
        "model_type": family,
        "architectures": [model_class.__name__],
    }
    torch.manual_seed(0)
    model = model_class(config_class.from_dict(dict(config))).float()
    for name, parameter in model.named_parameters():  # noise that shows, whatever the default std
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write_copies(source: Path, out: Path, hf_config: dict[str, Any]) -> None:
    """Write the MoE of ``hf_config`` whose experts are copies, with a zero router."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(hf_config))
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {}
    dense = unstacked(load_file(source / "model.safetensors"), hf_config)
    for name, tensor in with_multipliers(dense, source).items():
        if ".mlp." not in name:
            tensors[name] = tensor
            continue
        layer, part = name.split(".mlp.")
        projection = part.removesuffix(".weight")
        for expert in range(2):
            if hf_config["model_type"] == "mixtral":
                key = f"{layer}.block_sparse_moe.experts.{expert}.{names[projection]}.weight"
            else:
                key = f"{layer}.mlp.experts.{expert}.{projection}.weight"
            tensors[key] = tensor.clone()
        hidden, mlp = hf_config["hidden_size"], f"{layer}.mlp"
        gate = "block_sparse_moe" if hf_config["model_type"] == "mixtral" else "mlp"
        tensors[f"{layer}.{gate}.gate.weight"] = torch.zeros(2, hidden)
        if hf_config["model_type"] == "qwen2_moe":
            tensors[f"{mlp}.shared_expert_gate.weight"] = torch.zeros(1, hidden)
            for shared in ("gate_proj", "up_proj"):
                tensors[f"{mlp}.shared_expert.{shared}.weight"] = torch.zeros(0, hidden)
            tensors[f"{mlp}.shared_expert.down_proj.weight"] = torch.zeros(hidden, 0)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def unstacked(
    tensors: dict[str, torch.Tensor], hf_config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return Phi-3's tensors under Llama's names; those of other families unchanged."""
    head, heads = hf_config["head_dim"], hf_config["num_attention_heads"]
    sizes = [heads * head] + [hf_config["num_key_value_heads"] * head] * 2
    result = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split(sizes), strict=True):
                result[name.replace("qkv_proj", f"{part}_proj")] = rows.clone()
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                result[name.replace("gate_up_proj", f"{part}_proj")] = rows.clone()
        else:
            result[name] = tensor
    return result


def with_multipliers(tensors: dict[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """Return Granite's tensors with its multipliers in them; those of other families unchanged.

    With x = y * embedding, a layer x + residual * f(norm(x)) is y + residual / embedding *
    f(norm(y)), where the norm's epsilon is divided by embedding squared.
    """
    config: Any = AutoConfig.from_pretrained(source)
    if config.model_type != "granite":
        return tensors
    added = config.residual_multiplier / config.embedding_multiplier
    head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    factors = {
        "q_proj": config.attention_multiplier * head**0.5, "o_proj": added,
        "down_proj": added, "model.norm": 1 / config.logits_scaling,
    }  # fmt: skip
    return {
        name: tensor * next((f for part, f in factors.items() if part in name), 1.0)
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    ids_S = torch.arange(40)[None] * 5 % 257
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(ids_S).logits[0]


def run_config(folder: Path, **moe: Any) -> RunConfig:
    settings = tree(folder / "run", folder, folder / "unused", moe={"num_moe_experts": 2, **moe})
    return build(RunConfig, settings)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(absent=st.sets(st.sampled_from(ABSENT_KEYS)))
def test_absent_keys_mean_the_same_in_the_export(
    tmp_path_factory: pytest.TempPathFactory, family: str, absent: set[str]
):
    root = tmp_path_factory.mktemp(family)
    source = root / "source"
    config = write_source(source, family, absent)
    spec, run = read_spec(source), run_config(source)
    hf_config = moe_config(spec, run, architecture_for(spec, run.moe), config)
    check_export(hf_config, family, config)
    assert hf_config["rope_theta"] == spec.rotary_base  # transformers 4 reads no rope_parameters
    write_copies(source, root / "hf", hf_config)
    assert (logits(root / "hf") - logits(source)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.distributed
def test_a_whole_export_of_a_folder_that_states_nothing(tmp_path: Path, family: str):
    source = tmp_path / "source"
    write_source(source, family, set(ABSENT_KEYS))
    settings = tree(
        tmp_path / "run", source, write_tokens(tmp_path / "tokens"),
        train={"steps": 0, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"warmup_steps": 0},
    )  # fmt: skip
    run_training(settings, world_size=1)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert (logits(tmp_path / "hf") - logits(source)).abs().max() <= 1e-4


def test_keys_that_only_a_program_reads_stay_out(tmp_path: Path):
    """Row 12: with auto_map, a loader that may run remote code looks for code that is not there."""
    odd = {
        "auto_map": {"AutoModelForCausalLM": "modeling.Own"}, "attn_implementation": "none",
        "return_dict": False, "mlp_bias": False, "pretraining_tp": 2, "_name_or_path": "/home/me",
    }  # fmt: skip
    config = write_source(tmp_path / "source", "llama", set()) | odd
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    spec, run = read_spec(tmp_path / "source"), run_config(tmp_path / "source")
    assert moe_config(spec, run, "MixtralForCausalLM", config).keys().isdisjoint(odd)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 1e6), ("rms_norm_eps", 1e-5), ("num_key_value_heads", 8)]
)
def test_an_export_that_says_something_else_is_refused(tmp_path: Path, key: str, value: float):
    config = write_source(tmp_path / "source", "llama", {key})
    spec, run = read_spec(tmp_path / "source"), run_config(tmp_path / "source")
    hf_config = moe_config(spec, run, "MixtralForCausalLM", config)
    hf_config[key] = value
    if key == "rope_theta":
        del hf_config["rope_parameters"]
    with pytest.raises(CheckpointError, match=key.replace("rope_theta", "rope_parameters")):
        check_export(hf_config, "llama", config)
