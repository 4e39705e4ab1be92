"""Compare the numbers read from a config.json with the config classes of transformers."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.rope import RopeScaling
from megatron_moe.hf.spec import ModelSpec, read_spec, spec_from_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 3e-5,
    "initializer_range": 0.03,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SMALL}

# name, config of transformers 5
MODELS = {
    "llama1": LlamaConfig(**SMALL | {"num_key_value_heads": None}, bos_token_id=0, eos_token_id=1),
    "llama2": LlamaConfig(**SMALL),
    "llama3": LlamaConfig(
        **SMALL, eos_token_id=[7, 8, 9], rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "llama3.2": LlamaConfig(
        **SMALL | {"max_position_embeddings": 131072},
        tie_word_embeddings=True,
        rope_parameters={**LLAMA3, "rope_theta": 5e5},
    ),
    "wide_heads": LlamaConfig(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=None, head_dim=12),
    "mistral_window_covers": MistralConfig(**SMALL, sliding_window=512),
    "qwen2": Qwen2Config(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2_all_layers_full": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=3
    ),
    "qwen2.5": Qwen2Config(**SMALL, tie_word_embeddings=True, eos_token_id=5, bos_token_id=4),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "defaults_llama": LlamaConfig(),
    "defaults_qwen2": Qwen2Config(),
    "defaults_qwen3": Qwen3Config(),
}


def spec_from_transformers(config: PreTrainedConfig) -> ModelSpec:
    """Build the spec from a config class of transformers: the oracle."""
    rope = config.rope_parameters
    eos = config.eos_token_id
    head_dim = getattr(config, "head_dim", None)
    keys = [key for key in LLAMA3 if key != "rope_type"]
    return ModelSpec(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=rope["rope_theta"],
        rope_scaling=(
            RopeScaling(**{key: rope[key] for key in keys})
            if rope["rope_type"] == "llama3"
            else None
        ),
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type == "qwen3",
        initializer_range=config.initializer_range,
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        bos_token_id=config.bos_token_id,
    )


def written_by_version_4(config: dict) -> dict:
    """Rewrite a config.json with the keys of transformers 4."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = "bfloat16"
    config.pop("layer_types", None)
    return config


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_number_is_that_of_transformers(
    config: PreTrainedConfig, version: int, tmp_path: Path
):
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if version == 4:
        path.write_text(json.dumps(written_by_version_4(json.loads(path.read_text()))))
    assert read_spec(tmp_path) == spec_from_transformers(AutoConfig.from_pretrained(tmp_path))
    assert read_spec(tmp_path) == spec_from_transformers(config)


WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}),
        ("llama", {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}}),
        ("llama", {"rope_parameters": {"rope_theta": 8.0}, "rope_scaling": LLAMA3}),
        ("llama", {"rope_theta": 7, "rope_scaling": {**LLAMA3, "type": "llama3"}}),
        ("llama", {"sliding_window": 4}),
        ("mistral", {"sliding_window": None, "head_dim": None}),
        ("qwen2", {"max_window_layers": 0, "sliding_window": 4, "attention_bias": False}),
        ("qwen2", WINDOWED | {"layer_types": ["full_attention"] * 3}),
    ],
)
def test_what_is_missing_is_what_transformers_assumes(family: str, more: dict, tmp_path: Path):
    config = {"model_type": family, **{key: SMALL[key] for key in REQUIRED}, **more}
    config["num_attention_heads"] = 32  # divisible by the default groups of Mistral and Qwen
    config["hidden_size"] = 256
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path) == spec_from_transformers(AutoConfig.from_pretrained(tmp_path))


REFUSED = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        "architectures is ['GPT2LMHeadModel']: it has an FFN without",
    ),
    ({"architectures": None, "model_type": "gpt2"}, "architectures is None"),
    ({"model_type": "mistral"}, "model_type is 'mistral', but architectures is LlamaForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu': experts are SwiGLU"),
    ({"mlp_bias": True}, "mlp_bias is true"),
    ({"attention_bias": True}, "attention_bias is true"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1: must be 0"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set: dequantize"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor of rope_type yarn is None"),
    ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor of rope_type llama3 is None"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
    ({"hidden_size": "48"}, "hidden_size is '48': must be a positive integer"),
    ({"vocab_size": 0}, "vocab_size is 0: must be a positive integer"),
    ({"num_key_value_heads": 4}, "num_attention_heads (6) must be divisible by num_key_value_"),
    ({"num_attention_heads": 10}, "hidden_size (48) must be divisible by num_attention_heads (10)"),
    ({"head_dim": 7}, "head_dim is 7: must be even, because rotary attention"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None: must be a positive number"),
    ({"rope_theta": -1}, "rope_theta is -1: must be a positive number"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[r[:40] for _, r in REFUSED])
def test_a_model_that_would_differ_is_refused(change: dict, reason: str):
    spec_from_config(LLAMA)
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(LLAMA | change, where="somewhere/config.json")
    message = str(refusal.value)
    assert message.startswith("somewhere/config.json is not a model that can be upcycled:")
    assert reason in message
    assert message.count("\n") == 1, "one change is one reason"


@pytest.mark.parametrize("key", [*REQUIRED, "num_attention_heads"])
def test_a_missing_size_is_named(key: str):
    for config in (LLAMA, QWEN2 | {"use_sliding_window": True}):
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            spec_from_config({k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
         (None, 64, 64)),
        (LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                  "sliding_window": 64}, (64, 64, 64)),
        (LLAMA | {"sliding_window": 64}, ()),
    ],
    ids=["qwen2", "mistral", "llama"],
)  # fmt: skip
def test_windows_shorter_than_the_context_are_kept(config: dict, windows: tuple):
    assert spec_from_config(config).attention_windows == windows


def test_all_reasons_come_at_once():
    changed = LLAMA | {"mlp_bias": True, "hidden_act": "relu", "vocab_size": -1, "head_dim": 0}
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(changed)
    assert str(refusal.value).count("\n") == 4


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"source\.path must be a Hugging Face folder"):
        read_spec(tmp_path)
    for text, reason in (("{", "is not JSON"), ("[]", "architectures is list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            read_spec(tmp_path)
