"""Merged experts are the means that their plan describes, and twins become one expert again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import LAYOUTS
from numpy.typing import NDArray
from ranks import run_on_ranks
from safetensors.numpy import load_file
from tiny import save_moe
from training_runs import run_training, tree, write_tokens

from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.file import read_plan
from megatron_moe.experts.from_source import complete_from_source
from megatron_moe.experts.merge import Merge
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.load import load_model
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
Tensors = dict[str, NDArray[np.float32]]


def converted(
    folder: Path, source: Path, moe: dict[str, int], upcycle: dict[str, str], *, layout: str = "1"
) -> tuple[Path, RunConfig]:
    """Construct, build without training, and export; return the export and its configuration."""
    world_size, parallel = LAYOUTS[layout]
    tokens = folder.parent / "tokens"
    if not tokens.with_name("tokens.idx").exists():
        write_tokens(tokens)
    settings = tree(
        folder / "run", source, tokens, parallel=parallel, upcycle=upcycle,
        measure={"samples": 4}, train={"steps": 0, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"warmup_steps": 0},
    )  # fmt: skip
    settings["moe"] = moe
    config = build(RunConfig, complete_from_source(settings))
    if config.upcycle.plan is not None:
        run_on_ranks(construct, config, world_size=world_size)
    run_training(config.model_dump(mode="json"), world_size=world_size)
    export_checkpoint(folder / "run", folder / "hf")
    return folder / "hf", config


def construct(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.construct import construct

    construct(config, world)


def merging(folder: Path) -> dict[str, str]:
    return {"method": "prune", "choose": "merge", "plan": str(folder / "plan.safetensors")}


def merge_of(config: RunConfig, layer: int) -> Merge:
    assert config.upcycle.plan is not None
    plan = make_expert_plan(read_spec(config.source.path), config.moe, config.upcycle)
    merge = read_plan(config.upcycle.plan, plan, source=None).layer(layer).merge
    assert merge is not None
    return merge


@pytest.mark.parametrize(
    ("family", "experts", "layout"),
    [("glm4_moe", 2, "tp2-ep2-etp2"), ("qwen2_moe", 1, "1"), ("mixtral", 3, "pp2")],
)
def test_merged_experts_are_means(tmp_path: Path, family: str, experts: int, layout: str):
    """Means in float64 of what the folders hold; 1e-6 for rounding to fp32 and sums in fp32."""
    source = save_moe(tmp_path / "source", family)
    moe = {"num_moe_experts": experts, "moe_router_topk": min(experts, 2)}
    out, config = converted(tmp_path / "merged", source, moe, merging(tmp_path), layout=layout)
    before, after = open_safetensors(source), open_safetensors(out)
    last = 3
    merge, values = merge_of(config, last), {}
    for name in before.tensors:
        if f"layers.{last}.mlp." in name:
            values[name] = before.read(name).double().numpy()
    for name in (name for name in after.tensors if f"layers.{last}.mlp.experts." in name):
        start, _, rest = name.partition("experts.")
        expert, _, matrix = rest.partition(".")
        expected: Any = 0
        for member in merge.members(int(expert)):
            value, order_M = values[f"{start}experts.{member}.{matrix}"], merge.order_OM[member]
            ordered = value[:, order_M] if matrix == "down_proj.weight" else value[order_M]
            expected = expected + merge.weight_O[member] * ordered
        np.testing.assert_allclose(after.read(name).numpy(), expected, rtol=1e-5, atol=1e-6)
    for part in ("weight", "e_score_correction_bias"):
        name = f"model.layers.{last}.mlp.gate.{part}"
        if name in after.tensors:
            expected = merge.mixing() @ values[name]
            np.testing.assert_allclose(after.read(name).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "dense"),
    [("mixtral", "LlamaForCausalLM"), ("qwen3_moe", "Qwen3ForCausalLM")],
)
def test_one_expert_is_a_dense_model(tmp_path: Path, family: str, dense: str):
    """Logits of transformers agree within 1e-5 of the largest logit: sums in another order."""
    source = save_moe(tmp_path / "source", family)
    moe = {"num_moe_experts": 1, "moe_router_topk": 1}
    one, _ = converted(tmp_path / "one", source, moe, merging(tmp_path))
    assert export_checkpoint(tmp_path / "one" / "run", tmp_path / "dense", dense=True) == dense
    spec = read_spec(tmp_path / "dense")
    assert (spec.experts, spec.ffn_hidden_size) == (None, 96 if family == "mixtral" else 32)
    tokens = torch.randint(0, 257, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, ours = (
            load_model(folder, device="cpu", dtype=torch.float32)(tokens).logits
            for folder in (one, tmp_path / "dense")
        )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert "A dense model" in (tmp_path / "dense" / "README.md").read_text()


def test_twins_are_merged_into_the_source(tmp_path: Path):
    """Weights of twins sum to one in fp32, so that their mean may differ by rounding: 1e-6."""
    source = save_moe(tmp_path / "source", "mixtral")
    grown, _ = converted(
        tmp_path / "grown", source, {"num_moe_experts": 8}, {"method": "grow", "twins": "exact"}
    )
    moe = {"num_moe_experts": 4, "moe_router_topk": 2}
    back, config = converted(tmp_path / "back", grown, moe, merging(tmp_path), layout="ep2")
    assert merge_of(config, 0).into_O.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected, ours = (load_file(f / "model.safetensors") for f in (source, back))
    assert expected.keys() == ours.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert json.loads((back / "config.json").read_text())["num_local_experts"] == 4
