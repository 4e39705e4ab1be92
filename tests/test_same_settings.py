"""Tests that ranks with different settings are refused, whoever started them."""

from pathlib import Path

import pytest
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import tree, write_tokens

from megatron_moe.cli.same_settings import check_same_settings
from megatron_moe.config.load import build, overridden
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    return build(RunConfig, tree(tmp_path / "run", dense, tokens))


def compare(world: World, config: RunConfig, changes: list[list[str]]) -> None:
    check_same_settings(overridden(config, changes[world.rank]), world)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("optimizer.lr", (0.002, 0.005)), ("train.global_batch_size", (4, 8)),
        ("data.seq_length", (8, 16)), ("moe.moe_layers", ([0], [1])),
        ("train.freeze", ("[]", "[router]")),
    ],
)  # fmt: skip
def test_a_rank_with_another_setting_is_named(config: RunConfig, setting: str, values: tuple):
    first, other = ([f"{setting}={value}"] for value in values)
    with pytest.raises(ConfigError) as caught:
        run_on_ranks(compare, config, [first, first, other], world_size=3)
    message = str(caught.value)
    assert "rank 0 on " in message
    assert "rank 2 on " in message
    assert f"{setting} ({values[0]} and {values[1]})" in message
    assert "run the same command with the same file on all machines" in message


def test_paths_may_differ(config: RunConfig, tmp_path: Path):
    changes = [f"source.path={tmp_path}/a", f"data.path={tmp_path}/b", f"run.dir={tmp_path}/c"]
    run_on_ranks(compare, config, [[], changes], world_size=2)


def test_a_path_that_one_rank_lacks_is_named(config: RunConfig):
    with pytest.raises(ConfigError, match=r"upcycle\.plan \(None and a path\)"):
        run_on_ranks(compare, config, [[], ["upcycle.plan=plan.safetensors"]], world_size=2)
