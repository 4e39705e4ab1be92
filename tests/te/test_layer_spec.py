"""The layers for CUDA, built for real without a GPU, beside the torch-native ones of the same rank.

Transformer Engine's modules are built on the meta device, given memory on the CPU and filled from
a dense checkpoint as training fills them. Their kernels need a GPU and are not run; what they hold,
and what a checkpoint of it holds, is compared with the torch-native layers, which the rest of the
tests compare with ``transformers``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from layouts import layout
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny import save_dense
from torch import Tensor
from training_runs import tree

from megatron_moe.checkpoint.boxes import placements
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.config.train import Lora
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.names import match
from megatron_moe.hf.reader import SourceCheckpoint, open_safetensors
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.upcycle import Filled, upcycle
from megatron_moe.parallel.groups import create_groups
from megatron_moe.rules.check import check
from megatron_moe.runtime.engine import TORCH_ON_CPU, TRANSFORMER_ENGINE
from megatron_moe.runtime.stand_in import META, simulated_rank

pytestmark = pytest.mark.te

CASES = [  # layout, family, changes of the dense model
    ("1", "llama", {}),
    ("tp2 dp2 ep4", "qwen3", {}),
    ("cp2 dp2 ep4", "mistral", {}),
    ("tp2 pp2 dp2 ep2 etp2", "qwen2", {}),
    ("tp4 ep2 etp2", "llama", {"tie_word_embeddings": True}),
    ("dp4 ep2 etp2", "qwen3", {"tie_word_embeddings": True}),
    ("pp2 vpp2 dp2 ep2", "qwen2", {"tie_word_embeddings": True}),
    ("pp4 tp2 ep2", "qwen3", {}),
    ("pp2 vpp2 dp2 ep2 layout-E|tt|tt|L", "qwen3", {}),
]
PARTS = {"moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32}


@dataclass(frozen=True)
class Built:
    """One spec's model of one rank, filled."""

    model: Model
    filled: Filled
    saved: dict[tuple, Tensor]
    """What this rank would write: numbers by key, place and whether it is the one to write."""

    def parameters(self) -> Iterator[tuple[int, str, Tensor]]:
        """Chunk, name and parameter."""
        for index, module in enumerate(self.model.modules):
            for name, parameter in module.named_parameters():
                yield index, name, parameter

    def by_meaning(self) -> dict[tuple, Tensor]:
        """Parameters by what the name table says they are; a meaning that occurs twice fails."""
        result: dict[tuple, Tensor] = {}
        for chunk, name, parameter in self.parameters():
            row = match(name)
            assert row is not None, f"the name table has no row for {name}"
            meaning = (chunk, row.row.role, row.layer, row.expert)
            assert meaning not in result, f"{name} is a second {meaning}"
            result[meaning] = parameter.detach()
        return result


def boxes(model: Model, groups: ProcessGroupCollection) -> dict[tuple, Tensor]:
    result = {}
    for place in placements(model, groups):
        for box in place.boxes(place.parameter.detach().view(-1), begin=0):
            result[place.key, box.offset, box.global_shape, place.writes] = box.tensor
    return result


def run_config(
    folder: Path, parallel: dict[str, int], *, method: str = "copy", **moe: Any
) -> RunConfig:
    return build(
        RunConfig,
        tree(
            folder / "run", folder / "dense", folder / "tokens", parallel=parallel,
            moe={"num_moe_experts": 4, "moe_layers": [1, 2], **moe},
            train={"precision": "bf16", "global_batch_size": 16}, upcycle={"method": method},
        ),
    )  # fmt: skip


def both(
    config: RunConfig, dense: SourceCheckpoint, *, rank: int, world_size: int
) -> tuple[Built, Built]:
    """This rank with Transformer Engine's layers and with the torch-native ones."""
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    with simulated_rank(rank, world_size=world_size):
        layout, groups = create_groups(config.parallel, seed=0)
        built = []
        for engine in (TRANSFORMER_ENGINE, TORCH_ON_CPU):
            with META:
                model = build_model(
                    config, dense.spec, layout=layout, groups=groups, rank=rank, engine=engine
                )
            for module in model.modules:
                assert {parameter.device for parameter in module.parameters()} == {META}
                module.to_empty(device="cpu")
                for parameter in module.parameters():
                    parameter.data.fill_(torch.nan)
            filled = upcycle(model, dense, plan, layout=layout, rank=rank)
            built.append(Built(model, filled, boxes(model, groups)))
        return built[0], built[1]


def assert_same_tensors(ours: dict[tuple, Tensor], theirs: dict[tuple, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize(("name", "family", "changes"), CASES, ids=[case[0] for case in CASES])
def test_each_parameter_is_filled_once_with_its_slice_and_saved_in_its_place(
    tmp_path: Path, name: str, family: str, changes: dict[str, Any]
):
    dense = open_safetensors(save_dense(tmp_path / "dense", family, **changes))
    world_size, settings = layouts.changes(name)
    config = run_config(tmp_path, settings["parallel"])
    compare_all_ranks(config, dense, world_size)


def test_shared_experts_are_those_of_the_torch_native_layers(tmp_path: Path):
    """They are shared by tp, where the experts beside them are shared by etp."""
    dense = open_safetensors(save_dense(tmp_path / "dense", "qwen2"))
    world_size, parallel = layout("tp4 ep2 etp2")
    config = run_config(tmp_path, parallel, method="split_random", **PARTS)
    engine = compare_all_ranks(config, dense, world_size)
    shapes = {name: tuple(p.shape) for _, name, p in engine.parameters() if ".1.mlp." in name}
    assert shapes["decoder.layers.1.mlp.shared_experts.linear_fc1.weight"] == (16, 64)
    assert shapes["decoder.layers.1.mlp.experts.linear_fc1.weight0"] == (16, 64)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_layers_for_fp8_products_hold_and_save_the_same(tmp_path: Path, recipe: str):
    """Only products are in fp8: weights stay in bf16, and so do checkpoints and their bytes."""
    dense = open_safetensors(save_dense(tmp_path / "dense", "qwen3"))
    world_size, parallel = layout("tp2 dp2 ep4")
    config = run_config(tmp_path, parallel)
    fp8 = config.train.model_copy(update={"fp8": "hybrid", "fp8_recipe": recipe})
    run = config.run.model_copy(update={"device": "cuda"})
    config = config.model_copy(update={"run": run, "train": fp8})
    engine = compare_all_ranks(config, dense, world_size)
    transformer = engine.model.transformer
    assert (transformer.fp8, transformer.fp8_recipe) == ("hybrid", recipe)


@pytest.mark.parametrize("name", ["tp2 dp2 ep2", "pp2 vpp2 dp2 ep2"])
def test_layers_that_run_piece_by_piece_hold_and_save_the_same(tmp_path: Path, name: str):
    """With delayed weight gradients, which linear layers and grouped experts then store."""
    dense = open_safetensors(save_dense(tmp_path / "dense", "qwen2"))
    world_size, parallel = layout(name)
    config = run_config(tmp_path, parallel)
    overlap = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
    run = config.run.model_copy(update={"device": "cuda"})
    train = config.train.model_copy(update=overlap)
    engine = compare_all_ranks(
        config.model_copy(update={"run": run, "train": train}), dense, world_size
    )
    assert engine.model.transformer.overlap_moe_expert_parallel_comm
    assert engine.model.transformer.delay_wgrad_compute
    delayed = {
        name.split(".", 2)[2]
        for chunk in engine.model.modules
        for name, module in chunk.decoder.named_modules()
        if hasattr(module, "need_backward_dw") and module.need_backward_dw()
    }
    attention = {"self_attention.linear_qkv", "self_attention.linear_proj"}
    assert attention | {"mlp.experts.linear_fc1", "mlp.experts.linear_fc2"} <= delayed


def test_a_shared_expert_to_overlap_holds_and_saves_the_same(tmp_path: Path):
    dense = open_safetensors(save_dense(tmp_path / "dense", "qwen2"))
    world_size, parallel = layout("tp2 dp2 ep2")
    config = run_config(
        tmp_path, parallel, method="split_random", moe_shared_expert_overlap=True, **PARTS
    )
    run = config.run.model_copy(update={"device": "cuda"})
    engine = compare_all_ranks(config.model_copy(update={"run": run}), dense, world_size)
    assert engine.model.transformer.moe_shared_expert_overlap


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
def test_adapters_of_attention_hold_and_save_the_same(tmp_path: Path, family: str):
    """The norm before attention becomes a module of its own, under its old key in checkpoints."""
    dense = open_safetensors(save_dense(tmp_path / "dense", family))
    world_size, parallel = layout("tp2 dp2 ep4")
    config = run_config(tmp_path, parallel)
    config = config.model_copy(update={"lora": Lora(rank=3)})
    engine = compare_all_ranks(config, dense, world_size, fused=False)
    shapes = {name: tuple(p.shape) for _, name, p in engine.parameters() if ".adapter." in name}
    assert len(shapes) == 4 * 4
    assert shapes["decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight"] == (3, 32)


def compare_all_ranks(
    config: RunConfig, dense: SourceCheckpoint, world_size: int, *, fused: bool = True
) -> Built:
    """Each rank's two models, parameter by parameter and box by box; the last rank's for more."""
    check(config, dense.spec, world_size)
    for rank in range(world_size):
        engine, native = both(config, dense, rank=rank, world_size=world_size)
        names = [name for _, name, _ in engine.parameters()]
        assert any("linear_qkv.layer_norm_weight" in name for name in names) == fused
        routed = [
            name for name in names if ".mlp.experts.linear_fc1" in name
        ]  # none in some stages
        assert all(name[-1].isdigit() for name in routed), "not TE's experts"
        assert engine.filled == native.filled
        assert engine.filled.parameters == len(names)
        meanings = engine.by_meaning()
        assert not any(tensor.isnan().any() for tensor in meanings.values())
        assert_same_tensors(meanings, native.by_meaning())
        # Boxes, numbers and which rank writes them: a run may go on with the other spec's.
        assert engine.saved
        assert_same_tensors(engine.saved, native.saved)
    return engine


def test_names_and_shapes_of_a_folded_rank(tmp_path: Path):
    """As Transformer Engine 2.20 has them, for a reader: tp 2, ep 2, etp 1."""
    dense = open_safetensors(save_dense(tmp_path / "dense", "qwen3"))
    world_size, parallel = layout("tp2 dp2 ep2")
    config = run_config(tmp_path, parallel, moe_layers=[1])
    engine, _ = both(config, dense, rank=1, world_size=world_size)
    shapes = {name: tuple(parameter.shape) for _, name, parameter in engine.parameters()}
    assert {name for name in shapes if ".layers.2." in name or ".layers.3." in name}
    layers = ("decoder.layers.2.", "decoder.layers.3.")
    assert {name: shape for name, shape in shapes.items() if not name.startswith(layers)} == {
        "embedding.word_embeddings.weight": (129, 64),
        "decoder.layers.0.self_attention.linear_proj.weight": (64, 512),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (64,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (1024, 64),
        "decoder.layers.0.self_attention.q_layernorm.weight": (128,),
        "decoder.layers.0.self_attention.k_layernorm.weight": (128,),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (64,),
        "decoder.layers.0.mlp.linear_fc1.weight": (96, 64),
        "decoder.layers.0.mlp.linear_fc2.weight": (64, 48),
        "decoder.layers.1.self_attention.linear_proj.weight": (64, 512),
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": (64,),
        "decoder.layers.1.self_attention.linear_qkv.weight": (1024, 64),
        "decoder.layers.1.self_attention.q_layernorm.weight": (128,),
        "decoder.layers.1.self_attention.k_layernorm.weight": (128,),
        "decoder.layers.1.pre_mlp_layernorm.weight": (64,),
        "decoder.layers.1.mlp.router.weight": (4, 64),
        "decoder.layers.1.mlp.experts.linear_fc1.weight0": (192, 64),
        "decoder.layers.1.mlp.experts.linear_fc1.weight1": (192, 64),
        "decoder.layers.1.mlp.experts.linear_fc2.weight0": (64, 96),
        "decoder.layers.1.mlp.experts.linear_fc2.weight1": (64, 96),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (129, 64),
    }
