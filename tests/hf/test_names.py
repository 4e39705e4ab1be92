"""Check the name table against folders written by transformers, and for consistency."""

import itertools
from pathlib import Path
from typing import get_args

import pytest
import torch
from ranks import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_dense
from transformers import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_moe.config.data import Data
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.parts import Role
from megatron_moe.config.run import Parallel, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.families import FAMILIES as FAMILIES_TABLE
from megatron_moe.hf.header import read_headers
from megatron_moe.hf.names import (
    MOE_NAMES,
    ROLES,
    ROW_OF_ROLE,
    ROWS,
    Scope,
    dense_tensors,
    has_row,
    llama_tensors,
    match,
    shapes_of,
)
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

DENSE_MODELS = [
    pytest.param(family, tied, id=f"{family}-{'tied' if tied else 'untied'}")
    for family, tied in itertools.product(FAMILIES, (False, True))
]

TEMPLATES = [
    pytest.param(row.role, template, id=template) for row in ROWS for template in row.megatron
]

# All sizes differ, so that a swapped name changes a shape.
MOE_SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "vocab_size": 67, "moe_intermediate_size": 20, "num_experts": 3,
    "num_experts_per_tok": 2,
}  # fmt: skip
MOE_MODELS = {
    "MixtralForCausalLM": (
        MixtralConfig, MixtralForCausalLM, {"intermediate_size": 20, "num_local_experts": 3},
    ),
    "Qwen2MoeForCausalLM": (
        Qwen2MoeConfig, Qwen2MoeForCausalLM, {"shared_expert_intermediate_size": 8},
    ),
    "Qwen3MoeForCausalLM": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {}),
    "OlmoeForCausalLM": (OlmoeConfig, OlmoeForCausalLM, {"intermediate_size": 20}),
    "FlexOlmoForCausalLM": (
        FlexOlmoConfig, FlexOlmoForCausalLM, {"intermediate_size": 20, "pad_token_id": 0},
    ),
    "Glm4MoeForCausalLM": (
        Glm4MoeConfig, Glm4MoeForCausalLM,
        {"n_routed_experts": 3, "moe_intermediate_size": 8, "first_k_dense_replace": 0},
    ),
}  # fmt: skip


def shapes_on_disk(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("family", "tied"), DENSE_MODELS)
def test_dense_tensors_are_those_transformers_writes(tmp_path: Path, family: str, tied: bool):
    folder = save_dense(tmp_path, family, tie_word_embeddings=tied)
    spec = read_spec(folder)
    listed, tensors = list(dense_tensors(spec)), read_headers(folder)
    assert len(listed) == len(dict(listed)), "each tensor is named by one row"
    assert dict(listed) == {name: i.shape for name, i in llama_tensors(tensors, spec).items()}
    if not FAMILIES_TABLE[family].tensors:
        assert dict(listed) == shapes_on_disk(folder)


def test_a_stacked_tensor_is_taken_apart_by_rows(tmp_path: Path):
    """The oracle is transformers, which splits the outputs of fused layers so."""
    checkpoint = open_safetensors(save_dense(tmp_path, "phi3"))
    model = Phi3ForCausalLM.from_pretrained(tmp_path)
    attention, mlp = model.model.layers[2].self_attn, model.model.layers[2].mlp
    q, k, v = attention.qkv_proj.weight.split([64, 32, 32])
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    expected = {
        "self_attn.q": q,
        "self_attn.k": k,
        "self_attn.v": v,
        "mlp.gate": gate,
        "mlp.up": up,
    }
    for name, values in expected.items():
        assert torch.equal(checkpoint.read(f"model.layers.2.{name}_proj.weight"), values), name
    rows = checkpoint.read("model.layers.2.mlp.up_proj.weight", rows=torch.tensor([95, 3]))
    assert torch.equal(rows, up[[95, 3]])


def test_a_stacked_tensor_of_another_shape_is_reported_by_its_name(tmp_path: Path):
    folder = save_dense(tmp_path, "phi3")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate_up_proj.weight"
    save_file(tensors | {name: tensors[name][:-2].clone()}, folder / "model.safetensors")
    checkpoint = open_safetensors(folder)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.check_tensors(dict(dense_tensors(checkpoint.spec)))


@pytest.mark.parametrize("architecture", MOE_MODELS)
def test_moe_names_are_those_transformers_writes(tmp_path: Path, architecture: str):
    config_class, model_class, sizes = MOE_MODELS[architecture]
    model_class(config_class(**MOE_SHAPE | sizes)).save_pretrained(tmp_path)
    hidden, experts = 32, 3
    size = sizes.get("moe_intermediate_size", 20)
    shapes = {
        "router": ((experts, hidden),),
        "expert_fc1": ((size, hidden), (size, hidden)),
        "expert_fc2": ((hidden, size),),
        "shared_fc1": ((8, hidden), (8, hidden)),
        "shared_fc2": ((hidden, 8),),
        "shared_gate": ((1, hidden),),
        "expert_bias": ((experts,),),
    }
    named = [
        (template.format(layer=layer, expert=expert), shape)
        for role, templates in MOE_NAMES[architecture].items()
        for template, shape in zip(templates, shapes[role], strict=True)
        for layer in range(2)
        for expert in range(experts if role.startswith("expert_fc") else 1)
    ]
    on_disk = shapes_on_disk(tmp_path)
    routed = {
        name: shape
        for name, shape in on_disk.items()
        if ".mlp." in name + "." or "block_sparse_moe" in name
    }
    assert len(named) == len(dict(named))
    assert dict(named) == routed
    # Tensors outside the experts keep their names of the dense model.
    others = {name for name in on_disk if name not in routed}
    roles = {row.role for row in ROWS if row.scope in (Scope.MODEL, Scope.LAYER)}
    roles -= {"qkv_bias"} if architecture != "Qwen2MoeForCausalLM" else set()
    with_norms = ("Qwen3MoeForCausalLM", "OlmoeForCausalLM", "FlexOlmoForCausalLM")
    roles -= {"q_norm", "k_norm"} if architecture not in with_norms else set()
    after = {"attention_output_norm", "ffn_output_norm"}
    roles -= {"input_norm", "ffn_norm"} if architecture == "FlexOlmoForCausalLM" else after
    assert others == {
        template.format(layer=layer)
        for role in roles
        for template in ROW_OF_ROLE[role].hf
        for layer in range(2)
    }


@pytest.mark.parametrize(("role", "template"), TEMPLATES)
def test_match_inverts_every_template(role: str, template: str):
    result = match(template.format(layer=12, expert=345))
    assert result is not None
    assert result.row is ROW_OF_ROLE[role]
    assert result.layer == (12 if "{layer}" in template else None)
    assert result.expert == (345 if "{expert}" in template else None)


FUSED = [  # role, its parts in the order in which Megatron-Core stacks them
    ("qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    ("qkv_bias", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    ("fc1", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("expert_fc1", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
]


@pytest.mark.parametrize(("role", "parts"), [pytest.param(*row, id=row[0]) for row in FUSED])
def test_fused_rows_name_their_parts_in_megatrons_order(role: str, parts: tuple[str, ...]):
    """Gate and up, key and value have equal shapes: no other test here would detect a swap."""
    assert ROW_OF_ROLE[role].hf == tuple(f"model.layers.{{layer}}.{part}" for part in parts)


@pytest.mark.parametrize(
    ("architecture", "gate", "up"),
    [
        ("MixtralForCausalLM", "w1", "w3"),
        ("Qwen2MoeForCausalLM", "gate_proj", "up_proj"),
        ("Qwen3MoeForCausalLM", "gate_proj", "up_proj"),
        ("OlmoeForCausalLM", "gate_proj", "up_proj"),
        ("Glm4MoeForCausalLM", "gate_proj", "up_proj"),
    ],
)
def test_an_exported_expert_names_its_gate_first(architecture: str, gate: str, up: str):
    names = MOE_NAMES[architecture]["expert_fc1"]
    assert [name.split(".")[-2] for name in names] == [gate, up]


def test_no_megatron_name_stands_twice():
    names = [template for row in ROWS for template in row.megatron]
    assert len(names) == len(set(names))
    assert len(ROW_OF_ROLE) == len(ROWS)


def test_every_row_shapes_as_many_tensors_as_it_names(tmp_path: Path):
    spec = read_spec(save_dense(tmp_path))
    for row in ROWS:
        if row.hf:
            assert len(shapes_of(row, spec, E=3, M=5, S=7)) == len(row.hf), row.role


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_proj.bias",
        "decoder.layers.x.mlp.router.weight",
        "decoder.layers.0.mlp.router.weight.1",
        "module.decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.mlp.experts.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.linear_fc1_weight0",
        "decoderXlayers.0.mlp.router.weight",
        "",
    ],
)
def test_a_name_of_no_row_is_not_guessed(name: str):
    assert match(name) is None


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
        pytest.param("qwen2", {}, id="qwen2-bias"),
        pytest.param("qwen3", {}, id="qwen3-qk-norm"),
    ],
)
def test_megatrons_parameters_and_rows_are_one_to_one(tmp_path: Path, family: str, changes: dict):
    folder = save_dense(tmp_path, family, **changes)
    run_on_ranks(check_built_names, folder, read_spec(folder), world_size=1)


def check_built_names(world: World, folder: Path, spec: ModelSpec) -> None:
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups

    config = RunConfig(
        run=Run(dir=folder),
        source=Source(path=folder),
        moe=Moe(num_moe_experts=3, moe_layers=[1, 2], moe_shared_expert_intermediate_size=16),
        data=Data(path=folder, seq_length=8),
        train=Train(steps=0, precision="fp32"),
    )
    layout, groups = create_groups(Parallel(), seed=0)
    model = build_model(config, spec, layout=layout, groups=groups, rank=0, engine=TORCH_ON_CPU)
    matches = [match(name) for name, _ in model.modules[0].named_parameters()]
    assert all(matches)
    parameters = [(m.row.role, m.layer, m.expert) for m in matches if m]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == set(expected_parameters(spec, moe_layers={1, 2}, experts=3))


def expected_parameters(spec: ModelSpec, *, moe_layers: set[int], experts: int):
    """Yield every (role, layer, expert) that a model of this shape has on one rank."""
    for row in ROWS:
        if not has_row(row, spec):
            continue
        for layer in range(spec.num_layers):
            routed = layer in moe_layers
            match row.scope:
                case Scope.MODEL:
                    yield row.role, None, None
                case Scope.LAYER:
                    yield row.role, layer, None
                case Scope.DENSE:
                    yield from [(row.role, layer, None)] * (not routed)
                case _ if row.setting is not None:
                    pass
                case Scope.MOE | Scope.SHARED:
                    yield from [(row.role, layer, None)] * routed
                case Scope.EXPERT:
                    yield from ((row.role, layer, e) for e in range(experts if routed else 0))


def test_every_row_has_one_role():
    """Settings by role reach every parameter of a model, and none twice."""
    named = [row for rows in ROLES.values() for row in rows]
    assert sorted(named) == sorted(row.role for row in ROWS)
    assert set(ROLES) == set(get_args(Role))
