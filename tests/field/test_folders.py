"""Whole folders at random: the outcome is parity with transformers, or a refusal in words.

Draws families, absent keys, spellings of rotary settings, tied or separate outputs, dtypes, layouts
of files and odd neighbors. The oracle is transformers on a plain folder of the same model. 1e-4 is
fp32 sums in another order over logits of size 10.
"""

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, MULTIPLIERS, SHAPE
from training_runs import tree
from transformers import AutoModelForCausalLM

from megatron_moe.commands.export import architecture_for
from megatron_moe.commands.export_config import check_export, moe_config
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UserError
from megatron_moe.hf.load import load_model
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.rope import scaled_frequencies

SECONDS = 300
ABSENT = ("rope_theta", "rms_norm_eps", "head_dim", "hidden_act", "num_key_value_heads",
          "max_position_embeddings", "attention_dropout", "architectures",
          "embedding_multiplier", "attention_multiplier", "logits_scaling")  # fmt: skip
ROPES: list[dict[str, Any]] = [
    {}, {"rope_theta": 77.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0}, "original_max_position_embeddings": 16},
    {"rope_scaling": {"type": "longrope", "factor": 2.0}},  # refused
    {"rope_scaling": {"type": "linear"}},  # refused
    {"partial_rotary_factor": 0.5},  # refused
]  # fmt: skip
ODD: list[dict[str, Any]] = [
    {}, {"auto_map": {"AutoModel": "x.Y"}}, {"return_dict": False}, {"use_cache": None},
    {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"vocab_size": "257"},
    {"num_hidden_layers": 0}, {"num_attention_heads": 7}, {"rms_norm_eps": "1e-5"},
    {"sliding_window": 16, "use_sliding_window": True}, {"quantization_config": {"bits": 4}},
]  # fmt: skip
FILES = ("single", "shards", "shards without index", "lm_head only", "f16", "f64", "truncated",
         "a tensor less", "a tensor more")  # fmt: skip
FOLDERS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(sorted(FAMILIES)),
        "absent": st.sets(st.sampled_from(ABSENT), max_size=4),
        "rope": st.sampled_from(ROPES),
        "odd": st.one_of(st.just({}), st.sampled_from(ODD)),
        "tied": st.booleans(),
        "files": st.sampled_from(FILES),
    }
)
CONFIG = SHAPE | {
    "num_attention_heads": 32, "hidden_size": 128, "num_key_value_heads": 16, "head_dim": 4,
    "num_hidden_layers": 2, "hidden_act": "silu", "attention_dropout": 0.0, "pad_token_id": 0,
    "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def write_folder(folder: Path, draw: dict[str, Any]) -> None:
    """Write the folder that was drawn; its weights fit the config without the odd keys."""
    config_class, model_class = FAMILIES[draw["family"]]
    stated = CONFIG | (MULTIPLIERS if draw["family"] == "granite" else {})
    config = {k: v for k, v in stated.items() if k not in draw["absent"]}
    config |= {"model_type": draw["family"], "tie_word_embeddings": draw["tied"]}
    torch.manual_seed(0)
    model = model_class(config_class.from_dict(dict(config))).float()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder)
    if "architectures" not in draw["absent"]:
        config["architectures"] = [model_class.__name__]
    config = {**config, **draw["rope"], **draw["odd"]}
    (folder / "config.json").write_text(json.dumps(config))
    lay_out(folder, draw["files"])


def lay_out(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    match kind:
        case "shards" | "shards without index":
            path.unlink()
            index = {}
            for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
                file = f"model-0000{number}-of-00002.safetensors"
                save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
                index |= dict.fromkeys(names, file)
            if kind == "shards":
                content = json.dumps({"metadata": {}, "weight_map": index})
                (folder / "model.safetensors.index.json").write_text(content)
            return
        case "lm_head only":
            if "lm_head.weight" not in tensors:
                tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        case "f16" | "f64":
            dtype = torch.float16 if kind == "f16" else torch.float64
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        case "a tensor less":
            del tensors[sorted(tensors)[len(tensors) // 2]]
        case "a tensor more":
            tensors["model.layers.0.self_attn.extra"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-10])


@torch.no_grad()
def by_hand(folder: Path, ids_S: torch.Tensor) -> torch.Tensor:
    """Logits of the tensors and the numbers that this package reads, in a plain Llama block."""
    dense = open_safetensors(folder)
    spec = dense.spec
    dense.check_tensors(dict(dense_tensors(spec)))
    w = {name: dense.read(name).float() for name, _ in dense_tensors(spec)}
    cos_SC, sin_SC = _rotation(spec, len(ids_S))
    by = spec.multipliers
    x_SD = w["model.embed_tokens.weight"][ids_S] * by.embedding
    for layer in range(spec.num_layers):
        p = f"model.layers.{layer}."
        h_SD = x_SD
        if not spec.post_norms:
            h_SD = _norm(x_SD, w[p + "input_layernorm.weight"], spec)
        q, k, v = (
            (h_SD @ w[p + f"self_attn.{n}_proj.weight"].T
             + w.get(p + f"self_attn.{n}_proj.bias", torch.zeros(())))
            for n in "qkv"
        )  # fmt: skip
        if spec.qk_norm_spans_heads:
            q = _norm(q, w[p + "self_attn.q_norm.weight"], spec)
            k = _norm(k, w[p + "self_attn.k_norm.weight"], spec)
        q, k, v = (x.unflatten(1, (-1, spec.kv_channels)).transpose(0, 1) for x in (q, k, v))
        if spec.qk_layernorm and not spec.qk_norm_spans_heads:
            q = _norm(q, w[p + "self_attn.q_norm.weight"], spec)
            k = _norm(k, w[p + "self_attn.k_norm.weight"], spec)
        q, k = (_rotated(x, cos_SC, sin_SC) for x in (q, k))
        scale = (1.0 if spec.rope_scaling is None else spec.rope_scaling.attention_factor) ** 2
        out_HSC = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True,
            scale=scale * (by.attention or spec.kv_channels**-0.5),
        )[0]  # fmt: skip
        out_SD = out_HSC.transpose(0, 1).flatten(1) @ w[p + "self_attn.o_proj.weight"].T
        between = w[p + "post_attention_layernorm.weight"]
        x_SD = x_SD + by.residual * (_norm(out_SD, between, spec) if spec.post_norms else out_SD)
        h_SD = x_SD if spec.post_norms else _norm(x_SD, between, spec)
        gate_SF = torch.nn.functional.silu(h_SD @ w[p + "mlp.gate_proj.weight"].T)
        up_SF = h_SD @ w[p + "mlp.up_proj.weight"].T
        out_SD = (gate_SF * up_SF) @ w[p + "mlp.down_proj.weight"].T
        if spec.post_norms:
            out_SD = _norm(out_SD, w[p + "post_feedforward_layernorm.weight"], spec)
        x_SD = x_SD + by.residual * out_SD
    output = w["model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"]
    return _norm(x_SD, w["model.norm.weight"], spec) @ output.T / by.logits


def _norm(x: torch.Tensor, weight: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.layernorm_epsilon) * weight


def _rotation(spec: ModelSpec, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    channels = torch.arange(0, spec.kv_channels, 2).float() / spec.kv_channels
    frequency_C = 1.0 / spec.rotary_base**channels
    if spec.rope_scaling is not None:
        frequency_C = scaled_frequencies(frequency_C, spec.rope_scaling, base=spec.rotary_base)
    angle_SC = torch.outer(torch.arange(length).float(), frequency_C).repeat(1, 2)
    return angle_SC.cos(), angle_SC.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def check_folder(root: Path, draw: dict[str, Any]) -> str:
    """Return ``parity`` or ``refused``; anything else raises."""
    write_folder(root / "dense", draw)
    ids_S = torch.arange(12) * 7 % 257
    try:
        ours_SV = by_hand(root / "dense", ids_S)
        spec = open_safetensors(root / "dense").spec
        run = build(RunConfig, tree(root / "run", root / "dense", root / "tokens"))
        config = json.loads((root / "dense" / "config.json").read_text())
        export = moe_config(spec, run, architecture_for(spec, run.moe), config)
        check_export(export, spec.family, config)
    except UserError as error:
        return "refused" if len(str(error)) > 20 else f"refused without a reason: {error}"
    plain = {**draw, "files": "single", "odd": {}}
    write_folder(root / "plain", plain)
    if draw["files"] == "f16":
        lay_out(root / "plain", "f16")
    model: Any = AutoModelForCausalLM.from_pretrained(root / "plain", dtype=torch.float32)
    try:
        loaded = load_model(root / "dense", device="cpu", dtype=torch.float32)
    except UserError:  # transformers is stricter about keys that this package does not read
        return "refused"
    with torch.no_grad():
        expected_SV = model.eval()(ids_S[None]).logits[0]
        as_used_SV = loaded(ids_S[None], return_dict=True).logits[0]
    assert (ours_SV - expected_SV).abs().max() <= 1e-4
    if draw["files"] != "lm_head only":  # transformers does not tie in this direction
        assert (as_used_SV - expected_SV).abs().max() <= 1e-4
    return "parity"


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=15, suppress_health_check=QUIET)
@given(draw=FOLDERS)
def test_a_few_folders(tmp_path_factory: pytest.TempPathFactory, draw: dict[str, Any]):
    assert check_folder(tmp_path_factory.mktemp("folder"), draw) in ("parity", "refused")


@pytest.mark.slow
def test_folders_for_five_minutes(tmp_path_factory: pytest.TempPathFactory):
    end = time.monotonic() + float(os.environ.get("FIELD_FUZZ_SECONDS", SECONDS))
    outcomes: Counter[str] = Counter()
    families: Counter[str] = Counter()

    @settings(max_examples=20, derandomize=False, suppress_health_check=QUIET, database=None)
    @given(draw=FOLDERS)
    def some(draw: dict[str, Any]) -> None:
        root = tmp_path_factory.mktemp("folder")
        outcome = check_folder(root, draw)
        outcomes[outcome] += 1
        families[draw["family"]] += outcome == "parity"
        shutil.rmtree(root)

    while time.monotonic() < end:
        some()
    print(f"{outcomes.total()} folders: {dict(outcomes)}; parity by family: {dict(families)}")
    assert set(outcomes) == {"parity", "refused"}
    assert min(outcomes.values()) > 10
    assert all(families[family] for family in FAMILIES), families
