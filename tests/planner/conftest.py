"""Fixtures: models from papers, and run configurations for them."""

import pytest

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.shape import MoeShape, dense_shape, upcycled_shape

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA3_8B = LLAMA2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def run_config(*, gbs=256, seq_length=8192, moe=None, train=None, **parallel) -> RunConfig:
    return build(
        RunConfig,
        {
            "run": {"dir": "run"},
            "source": {"path": "dense"},
            "moe": {"num_moe_experts": 8, "moe_expert_capacity_factor": 1.0} | (moe or {}),
            "data": {"path": "text", "seq_length": seq_length},
            "train": {"steps": 1000, "global_batch_size": gbs} | (train or {}),
            "parallel": parallel,
        },
    )


def upcycled(hf: dict, **moe) -> MoeShape:
    return upcycled_shape(spec_from_config(hf), run_config(moe=moe).moe)


@pytest.fixture
def make_config():
    return run_config


@pytest.fixture
def llama2_config() -> dict:
    """The config.json of LLaMA-2-7B."""
    return LLAMA2_7B


@pytest.fixture
def llama3_config() -> dict:
    """The config.json of Llama-3-8B."""
    return LLAMA3_8B


@pytest.fixture
def llama3_spec():
    return spec_from_config(LLAMA3_8B)


@pytest.fixture
def llama3() -> MoeShape:
    return dense_shape(spec_from_config(LLAMA3_8B))


@pytest.fixture
def llama3_e8t2() -> MoeShape:
    return upcycled(LLAMA3_8B)


@pytest.fixture
def llama2() -> MoeShape:
    return dense_shape(spec_from_config(LLAMA2_7B))


@pytest.fixture
def llama2_split():
    """Return a function that makes a LLaMA-MoE shape: the dense FFN split into experts."""

    def make(active: int, experts: int) -> MoeShape:
        return upcycled(
            LLAMA2_7B,
            num_moe_experts=experts,
            moe_router_topk=active,
            moe_ffn_hidden_size=11008 // experts,
        )

    return make
