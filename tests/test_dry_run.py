"""The dry run against the planner, against real ranks, and on every configuration for H100s.

It stands for a rank in a child, because the rest of the tests fork ranks out of this process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from commands import run_command
from dense_models import DENSE_MODELS, H100_FILES, shipped
from layouts import layout
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.commands.dry_run import DryRun, dry_run
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.parallel.layout import fold
from megatron_moe.planner.parameters import rank_parameters, rank_tensors
from megatron_moe.planner.shape import run_shape

# Odd sizes, so that padding shows: no tensor is a multiple of 64, and the vocabulary is prime.
DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 8, "hidden_size": 48,
    "intermediate_size": 104, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12,
    "vocab_size": 1009, "max_position_embeddings": 256,
}  # fmt: skip
LAYOUTS = ["dp4", "tp2 cp2 pp2 ep2 etp2 dp2", "pp4 vpp2 ep4 dp4", "tp4 ep8 dp2", "tp2 pp2 etp1 dp6"]


def in_a_child(check, *args) -> None:
    mp.start_processes(lambda _: check(*args), nprocs=1, start_method="fork")


def agrees_with_the_planner(
    result: DryRun, config: RunConfig, spec: ModelSpec, *, world_size: int
) -> None:
    assert result.counted == result.planned
    shape, stage = run_shape(config, spec), result.groups["pp"].index(result.rank)
    assert result.parameters == sum(rank_parameters(shape, result.degrees, pp_rank=stage))
    chunks = rank_tensors(shape, result.degrees, pp_rank=stage)
    assert result.filled.parameters == sum(map(len, chunks))
    both = fold(config.parallel, world_size=world_size)
    for axis in ("tp", "cp", "dp", "pp"):
        assert result.groups[axis] in both.attention.groups(axis)
    for axis in ("etp", "ep", "edp"):
        assert result.groups[axis] in both.experts.groups(axis)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "device", "distributed", "parts"),
    [
        ("bf16", "auto", True, False),
        ("fp32", "cpu", True, False),
        ("bf16", "auto", False, False),
        ("bf16", "cpu", True, True),
    ],
)
def test_parameters_and_state_are_the_planners_to_the_byte(
    tmp_path: Path, precision: str, device: str, distributed: bool, parts: bool
):
    small = {"moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 8} if parts else {}
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(DENSE))

    def check() -> None:
        for name in LAYOUTS:
            world_size, parallel = layout(name)
            config = build(
                RunConfig,
                tree(
                    tmp_path, dense, tmp_path, parallel=parallel,
                    run={"device": device},
                    moe={"num_moe_experts": 8, "moe_layers": [0, 1, 3, 6], **small},
                    upcycle={"method": "split_random" if parts else "copy"},
                    train={"precision": precision, "global_batch_size": 32},
                    optimizer={"use_distributed_optimizer": distributed},
                ),
            )  # fmt: skip
            for rank in sorted({0, world_size // 3, world_size - 1}):
                result = dry_run(config, rank=rank, world_size=world_size)
                agrees_with_the_planner(result, config, read_spec(dense), world_size=world_size)

    in_a_child(check)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("optimizer", "precision", "freeze", "in_fp32"),
    [
        ({"optimizer": "muon"}, "bf16", [], True),
        ({"optimizer": "muon"}, "fp32", [], True),
        ({"optimizer": "muon"}, "bf16", ["experts", "attention@1-3"], False),
        ({}, "bf16", [], False),
        ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, "bf16", [], True),
        ({"exp_avg_dtype": "bf16", "use_distributed_optimizer": False}, "fp32", ["norms"], True),
        ({"exp_avg_sq_dtype": "bf16", "optimizer_cpu_offload": True}, "bf16", [], True),
    ],
)
def test_state_of_other_optimizers_and_dtypes_is_the_planners_to_the_byte(
    tmp_path: Path, optimizer: dict[str, Any], precision: str, freeze: list[str], in_fp32: bool
):
    """One moment of a matrix and two of the rest, on the rank that updates it, or on its host."""
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(DENSE))
    parts = {"moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 8}

    def check() -> None:
        for name in (*LAYOUTS, "tp2", "dp2 ep2", "cp2 tp2 dp2 ep2"):
            world_size, parallel = layout(name)
            config = build(
                RunConfig,
                tree(
                    tmp_path, dense, tmp_path, parallel=parallel,
                    moe={"num_moe_experts": 8, "moe_layers": [0, 1, 3, 6], **parts},
                    upcycle={"method": "split_random"}, optimizer=optimizer,
                    train={"precision": precision, "global_batch_size": 32, "freeze": freeze,
                           "grad_reduce_in_fp32": in_fp32},
                ),
            )  # fmt: skip
            for rank in {0, world_size // 3, world_size - 1}:
                found = dry_run(config, rank=rank, world_size=world_size)
                agrees_with_the_planner(found, config, read_spec(dense), world_size=world_size)

    in_a_child(check)


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(
    "stages",
    [
        [{"freeze": ["experts", "embeddings"]}],
        [{"freeze": ["attention", "norms", "router", "dense_ffn", "shared_experts"]}],
        [{"freeze": ["attention", "norms", "embeddings", "dense_ffn"]}],
        [{"steps": 2, "freeze": ["experts", "shared_experts"]}, {"freeze": ["norms", "router"]}],
        [{"freeze": ["experts@0-1", "attention@1-6", "norms@3", "dense_ffn@2", "router@6"]}],
    ],
    ids=["no-experts", "experts", "ffn", "stages", "layers"],
)
def test_frozen_roles_take_no_gradients_and_no_optimizer_state(
    tmp_path: Path, stages: list, distributed: bool
):
    """To the byte, as without freezing; of several stages, the one that trains the most."""
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(DENSE))
    parts = {"moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 8}

    def check() -> None:
        for name in LAYOUTS:
            world_size, parallel = layout(name)
            whole, config = (
                build(
                    RunConfig,
                    tree(
                        tmp_path, dense, tmp_path, parallel=parallel,
                        moe={"num_moe_experts": 8, "moe_layers": [0, 1, 3, 6], **parts},
                        upcycle={"method": "split_random"},
                        train={"precision": "bf16", "global_batch_size": 32, "stages": stages},
                        optimizer={"use_distributed_optimizer": distributed},
                    ),
                )
                for stages in ([], stages)
            )  # fmt: skip
            for rank in {0, world_size - 1}:
                free = dry_run(whole, rank=rank, world_size=world_size).counted
                found = dry_run(config, rank=rank, world_size=world_size)
                agrees_with_the_planner(found, config, read_spec(dense), world_size=world_size)
                assert found.counted.gradients < free.gradients
                assert found.counted.optimizer <= free.optimizer

    in_a_child(check)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("targets", "freeze", "distributed"),
    [
        (["attention"], [], True),
        (["attention", "experts"], ["embeddings", "norms"], True),
        (["experts"], ["adapters@0-1", "router"], True),
        (["attention", "experts"], ["adapters"], False),
    ],
    ids=str,
)
def test_adapters_take_the_planners_bytes(
    tmp_path: Path, targets: list[str], freeze: list[str], distributed: bool
):
    """To the byte; frozen targets take their weights alone."""
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(DENSE))

    def check() -> None:
        for name in LAYOUTS:
            if "etp2" in name and "experts" in targets:
                continue
            world_size, parallel = layout(name)
            config = build(
                RunConfig,
                tree(
                    tmp_path, dense, tmp_path, parallel=parallel, run={"engine": "torch"},
                    moe={"num_moe_experts": 8, "moe_layers": [0, 1, 3, 6]},
                    train={"precision": "bf16", "global_batch_size": 32, "freeze": freeze},
                    lora={"rank": 3, "alpha": 8.0, "targets": targets},
                    optimizer={"use_distributed_optimizer": distributed},
                ),
            )  # fmt: skip
            for rank in {0, world_size // 3, world_size - 1}:
                found = dry_run(config, rank=rank, world_size=world_size)
                agrees_with_the_planner(found, config, read_spec(dense), world_size=world_size)

    in_a_child(check)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "moe"),
    [
        ("copy", {}),
        ("drop", {}),
        ("granular", {"moe_ffn_hidden_size": 48}),
        ("split_clustered", {"moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32}),
    ],
    ids=["copy", "drop", "granular", "split_clustered"],
)
def test_bytes_read_are_those_of_real_ranks(tmp_path: Path, method: str, moe: dict[str, int]):
    """The same job twice: its receipt, and a dry run of each rank on a bare config.json."""
    dense = save_dense(tmp_path / "dense", "qwen2")
    world_size, parallel = layout("tp2 pp2 ep2")
    tokens = write_tokens(tmp_path / "tokens")
    settings = tree(
        tmp_path / "run", dense, tokens, parallel=parallel, train={"steps": 0},
        moe={"num_moe_experts": 4, "moe_layers": [1, 2], **moe}, upcycle={"method": method},
    )  # fmt: skip
    run_training(settings, world_size=world_size)
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((dense / "config.json").read_text())
    config = build(RunConfig, settings | {"source": {"path": str(bare)}})

    def check() -> None:
        for theirs in receipt["ranks"]:
            result = dry_run(config, rank=theirs["rank"], world_size=world_size)
            assert result.filled.bytes_read == theirs["bytes_read"] > 0
            assert result.filled.parameter_bytes == theirs["parameter_bytes"]
            assert result.source_bytes == receipt["source_bytes"]

    in_a_child(check)


@pytest.mark.distributed
def test_every_h100_configuration(tmp_path: Path):
    """Up to 1,024 ranks: the first of each, which holds the embedding."""
    for name, shape in DENSE_MODELS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape))

    def check() -> None:
        for path in H100_FILES:
            config, spec, gpus = shipped(path)
            folder = tmp_path / config.source.path.name
            config = config.model_copy(
                update={"source": config.source.model_copy(update={"path": folder})}
            )
            result = dry_run(config, rank=0, world_size=gpus)
            agrees_with_the_planner(result, config, spec, world_size=gpus)
            assert result.memory.total < 80
            assert 0 < result.filled.bytes_read <= result.source_bytes

    in_a_child(check)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(DENSE))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree(tmp_path, tmp_path / "dense", tmp_path)))
    return path


def test_json_of_the_command(yaml_file: Path):
    output = run_command(
        "train", yaml_file, "parallel.expert_parallel_size=4", "--dry-run", "--world-size", 4,
        "--rank", 3, "--json",
    )  # fmt: skip
    assert output.returncode == 0, output.stderr
    numbers = json.loads(output.stdout)
    assert numbers["groups"]["ep"] == [0, 1, 2, 3]
    assert numbers["experts"] == [3]
    assert numbers["state_bytes"] == numbers["planned_state_bytes"]
    assert numbers["memory_gib"]["total"] > 2.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dry-run",), "--world-size 8"),
        (("--dry-run", "--ranks", 4), "--world-size 4"),
        (("--world-size", 8), "require --dry-run"),
        (("--dry-run", "--world-size", 3), "train.global_batch_size"),
        (
            ("run.device=cpu", "run.engine=transformer_engine", "--dry-run", "--world-size", 4),
            "run.engine (transformer_engine) requires run.device=cuda",
        ),
    ],
)
def test_refusals(yaml_file: Path, arguments: tuple, words: str):
    output = run_command("train", yaml_file, *arguments)
    assert output.returncode == 2
    assert words in output.stderr
    assert "Traceback" not in output.stderr


def test_recomputation_of_another_engine_does_not_stop_the_dry_run(yaml_file: Path):
    """As on a laptop, which builds torch-native layers for a configuration of H100s."""
    output = run_command(
        "train", yaml_file, "run.device=auto", "train.recompute=selective", "--dry-run",
        "--world-size", 4, "--json",
    )  # fmt: skip
    assert output.returncode == 0, output.stderr
    assert "torch-native" in json.loads(output.stdout)["layer_spec"]


def test_construct_shows_hours_and_memory_of_a_model_that_is_not_here(yaml_file: Path):
    """Llama-2-7B in 16 experts of 688: solving 32 layers of N = 11,008 is known in closed form."""
    arguments = (
        "source.path=llama-2-7b", "moe.num_moe_experts=16", "moe.moe_ffn_hidden_size=688",
        "upcycle.method=split_random", "upcycle.fit=[down]", "upcycle.plan=x", "measure.samples=64",
    )  # fmt: skip
    output = run_command("construct", yaml_file, *arguments, "--dry-run", "--json")
    assert output.returncode == 0, output.stderr
    cost = json.loads(output.stdout)
    n, d = 11008, 4096
    assert cost["solving"] == pytest.approx(32 * 7 * (n**3 / 3 + 2 * n**2 * d))
    assert cost["disk_bytes"] == 32 * 4 * n * d
    assert cost["rank_bytes"] > 24 * n**2
    assert cost["hours"] > 0
    refused = run_command("construct", yaml_file, *arguments, "--json")
    assert refused.returncode == 2


def test_a_rank_that_is_not_there(yaml_file: Path):
    config = build(RunConfig, json.loads(yaml_file.read_text()))
    with pytest.raises(ConfigError, match=r"--rank \(4\) must be less than --world-size \(4\)"):
        dry_run(config, rank=4, world_size=4)
