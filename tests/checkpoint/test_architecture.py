"""Tests of the Hugging Face architecture chosen for an export, and of tensor names."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_on_ranks
from tiny import save_dense

from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.commands.export import architecture_for
from megatron_moe.commands.export_dense import dense_architecture
from megatron_moe.config.data import Data
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.run import Parallel, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.names import ROW_OF_ROLE, match
from megatron_moe.hf.spec import ModelSpec, read_spec, spec_from_config
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

MIXTRAL, QWEN2, QWEN3 = "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

SHARED = {
    "num_moe_experts": 4, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
TABLE = [  # family, router order, MoE layers, architecture
    ("llama", "topk_softmax", "all", MIXTRAL),
    ("llama", "topk_softmax", [0, 1, 2, 3], MIXTRAL),
    ("llama", "topk_softmax", [1, 3], QWEN2),
    ("llama", "softmax_topk", "all", QWEN2),
    ("llama", "softmax_topk", [1, 3], QWEN2),
    ("mistral", "topk_softmax", "all", MIXTRAL),
    ("mistral", "softmax_topk", "all", QWEN2),
    ("mistral", "topk_softmax", [0], QWEN2),
    ("qwen2", "topk_softmax", "all", QWEN2),
    ("qwen2", "softmax_topk", "all", QWEN2),
    ("qwen2", "topk_softmax", [2], QWEN2),
    ("qwen3", "topk_softmax", "all", QWEN3),
    ("qwen3", "softmax_topk", "all", QWEN3),
    ("qwen3", "softmax_topk", [0, 3], QWEN3),
]


def spec_of(family: str) -> ModelSpec:
    return spec_from_config(
        {
            "architectures": [f"{CLASSES[family]}ForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "sliding_window": None,
        }
    )


@pytest.mark.parametrize(
    ("family", "order", "layers", "architecture"),
    [
        pytest.param(*row, id=f"{row[0]}-{row[1]}-{'all' if row[2] == 'all' else 'some'}-{row[2]}")
        for row in TABLE
    ],
)
def test_the_architecture_means_the_same(family, order, layers, architecture):
    moe = Moe(num_moe_experts=4, router_order=order, moe_layers=layers)
    assert architecture_for(spec_of(family), moe) == architecture


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_shared_expert_is_qwen2_moes(family: str):
    assert architecture_for(spec_of(family), Moe(**SHARED)) == QWEN2


SIGMOID = {"num_moe_experts": 4, "moe_router_score_function": "sigmoid"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sigmoid_scores_are_glm4_moes(family: str):
    for changes in ({}, {"first_dense_layers": 2}, SHARED):
        moe = Moe(**SIGMOID | changes)
        assert architecture_for(spec_of(family), moe) == "Glm4MoeForCausalLM"


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        ({}, {"moe_layers": [0, 2]}, r"MoE layers \[0, 2\]: in GLM-4-MoE only the first layers"),
        ({"attention_windows": (8, 8, 8, 8)}, {}, "attention windows: GLM-4-MoE has none"),
    ],
)
def test_sigmoid_scores_that_no_architecture_has(spec: dict, changes: dict, reason: str):
    with pytest.raises(CheckpointError, match=reason):
        architecture_for(replace(spec_of("llama"), **spec), Moe(**SIGMOID | changes))


def test_a_shared_expert_with_norms_on_q_and_k_is_refused():
    with pytest.raises(CheckpointError, match="means the same as a qwen3 model") as caught:
        architecture_for(spec_of("qwen3"), Moe(**SHARED))
    reason, way_out = str(caught.value).split("\n")
    assert "moe.moe_shared_expert_intermediate_size 16" in reason
    assert way_out.startswith("  build without a shared expert")


def test_an_export_imports_nothing_of_megatron_core():
    """Importing it takes seconds and prints warnings that do not matter to an export."""
    code = (
        "import sys, megatron_moe.commands.export; "
        "sys.exit([name for name in sys.modules if name.startswith('megatron.')] or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


KEYS = [  # role, in a MoE layer, key
    ("embedding", False, "embedding.word_embeddings.weight"),
    ("input_norm", False, "decoder.layers.7.self_attention.linear_qkv.layer_norm_weight"),
    ("input_norm", True, "decoder.layers.7.self_attention.linear_qkv.layer_norm_weight"),
    ("ffn_norm", False, "decoder.layers.7.mlp.linear_fc1.layer_norm_weight"),
    ("ffn_norm", True, "decoder.layers.7.pre_mlp_layernorm.weight"),
    ("fc1", False, "decoder.layers.7.mlp.linear_fc1.weight"),
    ("router", True, "decoder.layers.7.mlp.router.weight"),
    ("expert_fc1", True, "decoder.layers.7.mlp.experts.experts.linear_fc1.weight"),
    ("expert_fc2", True, "decoder.layers.7.mlp.experts.experts.linear_fc2.weight"),
    ("final_norm", False, "decoder.final_layernorm.weight"),
    ("output", False, "output_layer.weight"),
]


@pytest.mark.parametrize(("role", "moe_layer", "key"), KEYS)
def test_keys_are_transformer_engines(role: str, moe_layer: bool, key: str):
    assert checkpoint_key(ROW_OF_ROLE[role], layer=7, moe_layer=moe_layer) == key


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_keys_are_those_megatron_saves(tmp_path: Path, family: str):
    """The keys of a mixed model's sharded state are exactly the keys that we read."""
    run_on_ranks(check_keys, save_dense(tmp_path, family), world_size=1)


def check_keys(world: World, folder: Path) -> None:
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups

    moe_layers = [1, 2]
    config = RunConfig(
        run=Run(dir=folder),
        source=Source(path=folder),
        moe=Moe(num_moe_experts=3, moe_layers=moe_layers, moe_shared_expert_intermediate_size=16),
        data=Data(path=folder, seq_length=8),
        train=Train(steps=0, precision="fp32"),
    )
    layout, groups = create_groups(Parallel(), seed=0)
    spec = read_spec(folder)
    model = build_model(config, spec, layout=layout, groups=groups, rank=0, engine=TORCH_ON_CPU)
    state = model.modules[0].sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    saved = {entry.key for entry in state.values() if hasattr(entry, "key")}
    read = set()
    for name, _ in model.modules[0].named_parameters():
        result = match(name)
        moe_layer = result.layer in moe_layers
        read.add(checkpoint_key(result.row, layer=result.layer, moe_layer=moe_layer))
    extra = {key for key in saved if key.endswith("_extra_state")}
    assert read == saved - extra


ONE = {"num_moe_experts": 1, "moe_router_topk": 1}
NOT_DENSE = {
    "experts": ("llama", {}, {"num_moe_experts": 2}, r"num_moe_experts \(2\) must be 1"),
    "sigmoid": ("llama", {}, SIGMOID | ONE, "the weight of a single expert is its score"),
    "shared": ("llama", {}, ONE | {"moe_shared_expert_intermediate_size": 8}, "a second FFN"),
    "sizes": ("llama", {}, ONE | {"first_dense_layers": 1, "moe_ffn_hidden_size": 8}, "sizes: 8 "),
    "spans": ("llama", {"qk_norm_spans_heads": True}, ONE, "span all heads"),
    "both": ("qwen2", {"qk_layernorm": True}, ONE, "norms and biases"),
    "rotary": ("llama", {"layers_without_rotary": (1,)}, ONE, "no rotary embedding"),
    "windows": ("qwen2", {"attention_windows": (4, 4)}, ONE, "attention windows"),
}


@pytest.mark.parametrize("case", NOT_DENSE)
def test_what_is_not_dense_is_refused(case: str):
    family, spec, moe, reason = NOT_DENSE[case]
    with pytest.raises(CheckpointError, match=reason) as caught:
        dense_architecture(replace(spec_of(family), **spec), Moe(**moe))
    assert "leave --dense out" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "architecture"),
    [
        ("llama", {}, "LlamaForCausalLM"),
        ("llama", {"attention_windows": (4, 4, 4, 4)}, "MistralForCausalLM"),
        ("qwen2", {}, "Qwen2ForCausalLM"),
        ("qwen3", {}, "Qwen3ForCausalLM"),
    ],
)
def test_the_dense_architecture_of_one_expert(family: str, changes: dict, architecture: str):
    assert dense_architecture(replace(spec_of(family), **changes), Moe(**ONE)) == architecture
