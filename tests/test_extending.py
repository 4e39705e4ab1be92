"""Run the code of docs/extending.md, and show that each new part works."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny import save_dense

from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.experts.recipe import Recipe
from megatron_moe.hf.families import FAMILIES, FAMILY_OF_ARCHITECTURE
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.runtime.world import World

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def run_section(title: str) -> dict[str, Any]:
    """Run the Python blocks of a section, and return the names they define."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.fixture
def restored_tables() -> Iterator[None]:
    tables: list[dict] = [FAMILIES, FAMILY_OF_ARCHITECTURE, METHODS]
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.mark.usefixtures("restored_tables")
def test_a_new_family_is_read(tmp_path: Path):
    run_section("A dense family")
    llama = open_safetensors(save_dense(tmp_path / "llama"))
    folder = save_dense(tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["PackedForCausalLM"], "model_type": "packed"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{name}{part}_proj.weight") for part in "qkv"]
        tensors[f"{name}W_pack.weight"] = torch.cat(parts)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    packed = open_safetensors(folder)
    packed.check_tensors(dict(dense_tensors(packed.spec)))
    for name in llama.tensors:
        assert torch.equal(packed.read(name), llama.read(name)), name


@pytest.mark.usefixtures("restored_tables")
def test_a_new_method_builds_the_dense_layer_from_its_parts():
    run_section("A construction method")
    recipe = Recipe(
        method="split_dealt", seed=0, num_experts=4, expert_ffn_hidden_size=6,  # pyright: ignore
        dense_ffn_hidden_size=24, hidden_size=8, router_init_std=0.02, moe_layers=(0,),
    )  # fmt: skip
    assert METHODS[recipe.method].sums_parts
    neurons_EM = ExpertPlan(recipe).layer(0).neurons_EM
    assert neurons_EM[1].tolist() == [1, 5, 9, 13, 17, 21]
    rng = np.random.default_rng(0)
    gate_FD, up_FD, down_FD, x_D = (rng.standard_normal(s) for s in ((24, 8), (24, 8), (24, 8), 8))

    def output(neurons: Any) -> Any:
        gate = gate_FD[neurons] @ x_D
        return (gate / (1 + np.exp(-gate)) * (up_FD[neurons] @ x_D)) @ down_FD[neurons]

    parts = sum(output(neurons_M) for neurons_M in neurons_EM)
    np.testing.assert_allclose(parts, output(slice(None)), rtol=1e-12)
    assert METHODS[recipe.method].partition(recipe, 0, Evidence()).shared_S.size == 0


def test_a_new_router_routes_by_its_own_logits():
    run_on_ranks(check_router, run_section, world_size=1)


def check_router(world: World, run_section: Callable[[str], dict[str, Any]]) -> None:
    from megatron_moe.model.routers import router_factory, routers_in
    from tests.model.test_router import router_arguments

    router_class = run_section("A router")["CosineRouter"]
    moe = SimpleNamespace(router_gate="cosine", megatron_capacity_factor=None)
    _, megatron = router_arguments()
    factory = router_factory(SimpleNamespace(moe=moe, run=None))  # pyright: ignore
    router = factory(**megatron)
    assert isinstance(router, router_class)
    assert list(routers_in(torch.nn.Sequential(router))) == [router]
    torch.nn.init.normal_(router.weight)
    x_sBD = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    rows_ED = router.weight.detach().double()
    cosines = torch.nn.functional.cosine_similarity(x_sBD.double()[..., None, :], rows_ED, dim=-1)
    # fp32 inside, divided by 0.07: a few units of the seventh digit.
    torch.testing.assert_close(router.gating(x_sBD).double(), cosines / 0.07, rtol=0, atol=1e-5)


def test_a_new_optimizer_has_a_row_of_settings_and_state():
    from megatron.core.optimizer import OptimizerConfig

    names = run_section("An optimizer")
    row = names["OPTIMIZERS"].pop("sgd")
    assert OptimizerConfig(optimizer="sgd", **row.settings(None)).sgd_momentum == 0.9
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.step()
    assert set(optimizer.state[parameter]) == set(row.state)
