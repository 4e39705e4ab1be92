"""configs/h100: every configuration is legal on as many GPUs as its name says, and fits."""

from pathlib import Path

import pytest

from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.plan.check import check_layout

FOLDER = Path(__file__).parents[2] / "configs" / "h100"
FILES = sorted(FOLDER.glob("*.yaml"))

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA32 = LLAMA3 | {"max_position_embeddings": 131072, "tie_word_embeddings": True}
DENSE = {
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
    "dense-56x6144": LLAMA3 | {
        "num_hidden_layers": 56, "hidden_size": 6144, "intermediate_size": 16384,
        "num_attention_heads": 48, "vocab_size": 32000,
    },
}  # fmt: skip


def test_there_are_some():
    assert len(FILES) >= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration_is_legal_and_fits(path):
    config = load(RunConfig, path)
    spec = spec_from_config(DENSE[config.dense.path.name])
    result = check_layout(config, spec, gpus=int(path.stem.rpartition("-")[2]))
    assert result.reasons == ()
    assert result.fits
    assert result.candidate is not None
    assert result.candidate.time.mfu > 30
