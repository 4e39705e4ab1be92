"""The shape and the tensors of a MoE folder: the oracle is the model that transformers built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MOES, save_moe
from transformers import AutoModelForCausalLM

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.names import MOE_TENSORS, dense_tensors
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import read_spec
from megatron_moe.hf.unread import open_unread


@pytest.mark.parametrize("stacked", [False, True], ids=["each", "stacked"])
@pytest.mark.parametrize("family", MOES)
def test_tensors_of_both_spellings(tmp_path: Path, family: str, stacked: bool):
    folder = save_moe(tmp_path, family, stacked=stacked)
    source = open_safetensors(folder)
    expected = dict(dense_tensors(source.spec))
    assert expected == {name: info.shape for name, info in source.tensors.items()}
    source.check_tensors(expected)

    mlp = AutoModelForCausalLM.from_pretrained(folder).model.layers[2].mlp
    gate, up = mlp.experts.gate_up_proj[3].chunk(2)
    values = [*zip(MOE_TENSORS["expert_fc1"], (gate, up), strict=True),
              (MOE_TENSORS["expert_fc2"][0], mlp.experts.down_proj[3]),
              (MOE_TENSORS["router"][0], mlp.gate.weight)]  # fmt: skip
    for name, value in values:
        assert torch.equal(source.read(name.format(layer=2, expert=3)), value), name
    assert source.bytes_read == sum(value.numel() * 4 for _, value in values)


@pytest.mark.parametrize("family", MOES)
def test_a_folder_without_weights_has_the_same_tensors(tmp_path: Path, family: str):
    folder = save_moe(tmp_path, family)
    (folder / "model.safetensors").unlink()
    unread = open_unread(folder)
    unread.check_tensors(dict(dense_tensors(unread.spec)))


def test_a_stack_of_another_shape_is_reported(tmp_path: Path):
    folder = save_moe(tmp_path, "qwen3_moe", stacked=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    source = open_safetensors(folder)
    with pytest.raises(CheckpointError, match=r"missing[\s\S]*unexpected[\s\S]*gate_up_proj"):
        source.check_tensors(dict(dense_tensors(source.spec)))


SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mixtral", {}, {"num_moe_experts": 4, "moe_ffn_hidden_size": 96, "moe_layers": (0, 1, 2, 3),
                     "router_order": "topk_softmax", "shared_size": 0}),
    ("qwen2_moe", {"decoder_sparse_step": 2},
     {"moe_layers": (1, 3), "shared_size": 48, "moe_shared_expert_gate": True,
      "router_order": "softmax_topk"}),
    ("qwen2_moe", {"mlp_only_layers": [0, 3], "shared_expert_intermediate_size": 0},
     {"moe_layers": (1, 2), "shared_size": 0, "moe_shared_expert_gate": False}),
    ("qwen3_moe", {"norm_topk_prob": True}, {"router_order": "topk_softmax"}),
    ("olmoe", {}, {"moe_ffn_hidden_size": 96, "router_order": "softmax_topk"}),
    ("glm4_moe", {"n_shared_experts": 2, "first_k_dense_replace": 3},
     {"moe_layers": (3,), "shared_size": 64, "moe_router_score_function": "sigmoid",
      "moe_router_enable_expert_bias": True, "moe_shared_expert_gate": False}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "expected"), SHAPES)
def test_the_shape(tmp_path: Path, family: str, changes: dict[str, Any], expected: dict[str, Any]):
    experts = read_spec(save_moe(tmp_path, family, **changes)).experts
    assert {name: getattr(experts, name) for name in expected} == expected


REFUSED = [
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok .5. must be at most"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0: must be a positive integer"),
    ("qwen2_moe", {"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1"),
    ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias is true"),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, "the weight is always 1"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0: must be null"),
    ("glm4_moe", {"n_group": 2}, "n_group is 2: must be 1"),
    ("glm4_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("glm4_moe", {"rope_parameters": None}, "partial_rotary_factor is 0.5"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_a_moe_that_would_differ_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
):
    folder = save_moe(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=reason):
        read_spec(folder)
