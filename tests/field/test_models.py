"""Rows 25 to 27, 29, 31: variants of models that people have, against transformers on the folder.

Each is upcycled to copies and compared by the program's own check of logits, which loads the source
with transformers, and then exported and compared again here. 1e-4 on logits of size 10 is fp32 sums
in another order; without the scaling or with a wrong name, errors exceed 1e-2.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_dense
from training_runs import run_training, tree, write_tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import read_spec, spec_from_config
from megatron_moe.model.rope import scaled_frequencies
from megatron_moe.rules.check import violations

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ROPES: dict[str, dict[str, Any]] = {
    "linear-v4": {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear-v5": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.5}},
    "dynamic-v4": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn-v4": {"rope_theta": 5e3, "rope_scaling": {**YARN, "type": "yarn"}},
    "yarn-v5": {"rope_parameters": {**YARN, "rope_theta": 5e3, "beta_fast": 16, "truncate": False}},
    "yarn-attention-factor": {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    "yarn-mscale": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn-without-original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "llama3-top-level": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    "llama3-without-original": {"rope_scaling": LLAMA3},
}
FULL_RUNS = ("linear-v4", "yarn-v5", "yarn-attention-factor", "llama3-top-level", "dynamic-v4")
ALIKE = ("linear-v4", "yarn-attention-factor")
"""Two of them, which take the way of another."""


def with_config(folder: Path, **changes: Any) -> Path:
    """Replace keys of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        config.pop(key, None)
    path.write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_frequencies_are_those_of_transformers(tmp_path: Path, name: str, family: str):
    with_config(save_dense(tmp_path / "dense", family, num_hidden_layers=1), **ROPES[name])
    spec = read_spec(tmp_path / "dense")
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    kind = config.rope_parameters["rope_type"]
    expected_C, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    channels = torch.arange(0, spec.kv_channels, 2).float() / spec.kv_channels
    assert spec.rope_scaling is not None
    ours_C = scaled_frequencies(
        1.0 / spec.rotary_base**channels, spec.rope_scaling, base=spec.rotary_base
    )
    torch.testing.assert_close(ours_C, expected_C, rtol=2e-6, atol=0)
    assert spec.rope_scaling.attention_factor == pytest.approx(factor)


def upcycled_and_exported(
    tmp_path: Path, *, parallel: dict[str, int] | None = None, world_size: int = 1
) -> None:
    """Run the whole program on tmp_path/dense and compare logits at both ends."""
    settings = tree(
        tmp_path / "run", tmp_path / "dense", write_tokens(tmp_path / "tokens"),
        train={"steps": 0, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"warmup_steps": 0}, upcycle={"verify": "always"}, parallel=parallel or {},
    )  # fmt: skip
    run_training(settings, world_size=world_size)
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["verification"]["max_logit_error"] <= 1e-4
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    ids_S = torch.arange(32)[None] * 7 % 257
    with torch.no_grad():
        dense, moe = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
            for name in ("dense", "hf")
        )
        assert (moe(ids_S).logits - dense(ids_S).logits).abs().max() <= 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in FULL_RUNS],
)
def test_scaled_rotary_models(tmp_path: Path, name: str):
    with_config(save_dense(tmp_path / "dense"), **ROPES[name])
    upcycled_and_exported(tmp_path)


@pytest.mark.distributed
def test_scaled_rotary_models_under_tp_and_pp(tmp_path: Path):
    with_config(save_dense(tmp_path / "dense"), **ROPES["yarn-attention-factor"])
    degrees = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
    upcycled_and_exported(tmp_path, parallel=degrees, world_size=2)


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral", "qwen3"))]
)
def test_windows_that_hold_every_sequence(tmp_path: Path, family: str):
    """Sequences have 32 tokens: a window of 32 changes nothing, and stays in the export."""
    changes: dict[str, Any] = {"sliding_window": 32}
    if family != "mistral":
        changes |= {"use_sliding_window": True, "max_window_layers": 0}
    save_dense(tmp_path / "dense", family, **({"head_dim": 16} if family == "qwen3" else {}))
    path = tmp_path / "dense" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"}
    path.write_text(json.dumps(config | changes))
    upcycled_and_exported(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path / "hf").sliding_window == 32
    ids_S = torch.arange(100)[None] * 7 % 257  # longer than the window: the export has it too
    with torch.no_grad():
        dense, moe = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
            for name in ("dense", "hf")
        )
        assert (moe(ids_S).logits - dense(ids_S).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 16},
         r"data\.seq_length \(32\) must be at most the source's sliding_window \(16\)"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1,
                   "layer_types": None}, r"largest data\.seq_length: 16"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0},
                   "max_position_embeddings": 16},
         r"must be at most max_position_embeddings \(16\).*dynamic"),
    ],
)  # fmt: skip
def test_sequences_beyond_what_a_source_allows_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
):
    with_config(save_dense(tmp_path / "dense", family, num_hidden_layers=2), **changes)
    config = build(RunConfig, tree(tmp_path / "run", tmp_path / "dense", tmp_path / "tokens"))
    result = violations(config, read_spec(tmp_path / "dense"), 1)
    assert any(re.search(message, violation) for violation in result), result


# ---- names and files -----------------------------------------------------------------------------


def rename_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def two_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = folder / f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "tied-with-lm-head-only": rename_embedding, "one-shard": one_shard, "two-shards": two_shards,
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_that_are_laid_out_otherwise(tmp_path: Path, name: str):
    """The tensors are those of the same model in its usual layout."""
    save_dense(tmp_path / "usual", tie_word_embeddings=True)
    save_dense(tmp_path / "dense", tie_word_embeddings=True)
    LAYOUTS[name](tmp_path / "dense")
    usual = load_file(tmp_path / "usual" / "model.safetensors")
    dense = open_safetensors(tmp_path / "dense")
    assert set(dense.tensors) == set(usual)
    for tensor in usual:
        assert torch.equal(dense.read(tensor), usual[tensor]), tensor
    if name == "one-shard":
        settings = tree(
            tmp_path / "run", tmp_path / "dense", write_tokens(tmp_path / "tokens"),
            train={"steps": 0, "global_batch_size": 4, "precision": "fp32"},
            optimizer={"warmup_steps": 0}, upcycle={"verify": "always"},
        )  # fmt: skip
        run_training(settings, world_size=1)
        receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
        assert receipt["verification"]["max_logit_error"] <= 1e-4


def test_an_incomplete_set_of_shards_is_refused(tmp_path: Path):
    save_dense(tmp_path / "dense")
    two_shards(tmp_path / "dense")
    (tmp_path / "dense" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has 1 of 2 shards, and no model"):
        open_safetensors(tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, r"attention_bias is true.*save the model again without"),
        ({"mlp_bias": True}, r"mlp_bias is true.*save the model again without"),
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "OPTForCausalLM.*SwiGLU"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*SwiGLU"),
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "FFN without a gate"),
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "Gemma2.*GELU.*tanh"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3.*latent attention"),
        (
            {
                "architectures": ["GraniteForCausalLM"],
                "model_type": "granite",
                "embedding_multiplier": 0,
            },
            "embedding_multiplier is 0: must be a positive number",
        ),
        (
            {
                "architectures": ["GraniteForCausalLM"],
                "model_type": "granite",
                "logits_scaling": "8",
            },
            "logits_scaling is '8': must be a positive number",
        ),
        (
            {
                "architectures": ["GraniteForCausalLM"],
                "model_type": "granite",
                "attention_bias": True,
            },
            "attention_bias is true",
        ),
    ],
)
def test_what_is_not_built_is_refused_with_the_way_out(change: dict[str, Any], message: str):
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        spec_from_config(config | change)
