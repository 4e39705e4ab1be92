"""Runs with the layers and settings that the torch engine has on CUDA, computed on a CPU.

Megatron-Core is told the same, experts lie in one view, and weights are gathered while the forward
pass runs. Only the kernels are the CPU's. The oracle is the same run with the engine of the CPU.
"""

from pathlib import Path
from typing import Any

import pytest
from layouts import changes
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.engine import TORCH_ON_CUDA
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
LAYOUTS = [
    "dp2", "tp2 ep2",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("1", "pp2 dp2 ep2 recompute-full", "dp2 etp2 recompute-moe")),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    dense = save_dense(root / "dense", hidden_size=64, intermediate_size=96)
    return {"root": root, "dense": dense, "tokens": write_tokens(root / "tokens")}


def both(inputs: dict[str, Path], name: str, precision: str) -> tuple[list[dict[str, Any]], ...]:
    """Metrics of the run as on CUDA, and of the run on a CPU."""
    world_size, settings = changes(name)
    settings["train"] |= {"precision": precision}
    folders = [inputs["root"] / f"{name.replace(' ', '-')}-{precision}-{kind}" for kind in "ab"]
    as_on_cuda, on_cpu = (
        tree(folder, inputs["dense"], inputs["tokens"], **settings) for folder in folders
    )
    config = build(RunConfig, as_on_cuda)
    config.run.dir.mkdir(parents=True)
    run_on_ranks(train_as_on_cuda, config, world_size=world_size)
    return read_metrics(config.run.dir), run_training(on_cpu, world_size=world_size)


def train_as_on_cuda(world: World, config: RunConfig) -> None:
    from megatron_moe.commands import train as story
    from megatron_moe.model.grouped_experts import ExpertKernel, GroupedExperts

    story.engine_of = lambda wanted, world: TORCH_ON_CUDA
    if config.train.precision == "bf16":
        GroupedExperts.kernel = lambda self: ExpertKernel("grouped_mm", "to be tested")
    story.train(config, world)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fp32_is_the_cpus_to_the_last_bit(inputs: dict[str, Path], name: str):
    """The kernels are the same, so a weight that is read before it is gathered would show."""
    ours, expected = both(inputs, name, "fp32")
    for line, other in zip(ours, expected, strict=True):
        for key in ("loss/lm", "grad_norm", "loss/load_balancing", "router/entropy"):
            assert line.get(key) == other.get(key), (key, line["step"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_with_grouped_products_is_the_loop_within_rounding(inputs: dict[str, Path], name: str):
    """bf16 rounds to 2^-9 of a number, and five steps of AdamW amplify it; a mistake shows at 1e-1.

    The first loss, before any update, differs by the rounding of one forward pass.
    """
    ours, expected = both(inputs, name, "bf16")
    losses, wanted = ([line["loss/lm"] for line in lines[1:]] for lines in (ours, expected))
    assert len(losses) == 5
    assert losses[0] == pytest.approx(wanted[0], rel=1e-3)
    assert losses == pytest.approx(wanted, rel=1e-2)
