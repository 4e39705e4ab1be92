"""The config.json of the dense models that configs/h100 names, as far as this package reads it."""

from pathlib import Path

from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec, spec_from_config

H100_FILES = sorted((Path(__file__).parents[1] / "configs" / "h100").glob("*.yaml"))

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA32 = LLAMA3 | {"max_position_embeddings": 131072, "tie_word_embeddings": True}
DENSE_MODELS = {
    "Meta-Llama-3-8B": LLAMA3,
    "Meta-Llama-3-70B": LLAMA3 | {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64,
    },
    "Llama-3.2-3B": LLAMA32 | {
        "num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192,
        "num_attention_heads": 24, "head_dim": 128,
    },
    "Llama-3.2-1B": LLAMA32 | {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
    },
    "Llama-2-7b-hf": LLAMA3 | {
        "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "Qwen2-7B": {
        "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 28, "hidden_size": 3584,
        "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "max_position_embeddings": 131072, "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    },
    "dense-56x6144": LLAMA3 | {
        "num_hidden_layers": 56, "hidden_size": 6144, "intermediate_size": 16384,
        "num_attention_heads": 48, "vocab_size": 32000,
    },
}  # fmt: skip


def shipped(path: Path) -> tuple[RunConfig, ModelSpec, int]:
    """A file of configs/h100, its dense model, and the GPUs that its name says."""
    config = load(RunConfig, path)
    spec = spec_from_config(DENSE_MODELS[config.source.path.name])
    return config, spec, int(path.stem.rpartition("-")[2])
