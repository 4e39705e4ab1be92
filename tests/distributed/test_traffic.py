"""What a step puts into collectives, counted on real ranks, equals the planner's formula."""

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import changes
from ranks import run_on_ranks
from tiny import SHAPE
from training_runs import tree

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.by_matrix import kept_tensors
from megatron_moe.planner.memory import has_own_replicas
from megatron_moe.planner.parameters import rank_tensors
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.traffic import Traffic, sent_per_rank, step_traffic
from megatron_moe.planner.workload import Degrees, degrees_of, workload_of
from megatron_moe.rules.check import check
from megatron_moe.runtime.world import World

LAYERS, EXPERTS = SHAPE["num_hidden_layers"], 4


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "precision", "tied", "frozen"),
    [
        ("tp2 dp2 ep2", "fp32", False, []),
        ("pp2 cp2 ep2", "bf16", True, []),
        ("tp2 etp2 padded", "bf16", False, []),
        ("tp2 cp2 ep2 kv1", "bf16", False, []),
        ("tp2 dp2 ep2", "fp32", False, ["attention", "norms", "experts", "dense_ffn"]),
        ("pp2 dp2", "bf16", True, ["embeddings", "router", "attention"]),
        ("tp2 pp2 dp2 ep2", "fp32", False, ["attention@0-1", "norms@2", "experts@3", "router@1"]),
        ("tp2 dp2", "bf16", False, ["embeddings", "router"]),
    ],
)
def test_bytes_of_a_step_are_the_formula(
    tmp_path: Path, layout: str, precision: str, tied: bool, frozen: list[str]
):
    bytes_are_the_formula(tmp_path, layout, precision, tied, frozen)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "precision", "frozen"),
    [
        ("tp2 dp2 ep2", "fp32", []),
        ("pp2 cp2 ep2", "bf16", ["router"]),
        ("tp2 dp2 etp2", "bf16", ["attention@1-2", "experts@3"]),
        ("tp2 ep2", "fp32", []),
    ],
)
def test_bytes_of_a_step_of_muon_are_the_formula(
    tmp_path: Path, layout: str, precision: str, frozen: list[str]
):
    bytes_are_the_formula(tmp_path, layout, precision, False, frozen, "muon")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "targets", "frozen"),
    [
        ("tp2 dp2 ep2", ["attention", "experts"], []),
        ("pp2 tp2", ["attention"], ["experts", "adapters@0-1"]),
    ],
)
def test_bytes_of_a_step_with_adapters_are_the_formula(
    tmp_path: Path, layout: str, targets: list[str], frozen: list[str]
):
    lora = {"rank": 3, "targets": targets}
    bytes_are_the_formula(tmp_path, layout, "fp32", False, frozen, lora=lora)


def bytes_are_the_formula(
    tmp_path: Path,
    layout: str,
    precision: str,
    tied: bool,
    frozen: list[str],
    optimizer: str = "adam",
    lora: dict[str, Any] | None = None,
) -> None:
    world_size, settings = changes(layout.removesuffix(" kv1"))
    settings |= {"optimizer": {"optimizer": optimizer}, "lora": lora or {}}
    (tmp_path / "dense").mkdir()
    shape: dict[str, Any] = dict(SHAPE)
    if layout.endswith("kv1"):  # more tp ranks than query groups
        shape |= {"num_key_value_heads": 1}
    bare = {**shape, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(bare))
    settings["moe"] = {"num_moe_experts": EXPERTS, **settings["moe"]}
    in_fp32 = "attention" not in frozen or precision == "fp32"
    settings["train"] |= {
        "precision": precision, "freeze": frozen, "grad_reduce_in_fp32": in_fp32,
    }  # fmt: skip
    if "dense_ffn" in frozen:
        settings["moe"] |= {"moe_layers": [1, 2]}
    config = build(
        RunConfig, tree(tmp_path / "run", tmp_path / "dense", tmp_path / "none", **settings)
    )
    check(config, read_spec(config.source.path), world_size)
    run_on_ranks(_count, config, tmp_path / "counted.json", world_size=world_size)
    counted = json.loads((tmp_path / "counted.json").read_text())
    # The numbers of the log: (2 + 4 L + 2 L E) of a step and three of its time, in fp64.
    # Layers that stay dense are in them too.
    numbers = 2 + 4 * LAYERS + 2 * LAYERS * EXPERTS + 3
    of_world = counted.pop("world all_reduce") - world_size * numbers * 8
    # Muon sums the norm over all ranks at once, or, unsharded, over those of a replica.
    norm = of_world + sum(counted.pop(f"{g} all_reduce", 0) for g in ("mp", "etp_ep_pp"))
    if optimizer == "muon":
        counted["optimizer all_reduce"] = norm
    else:
        assert norm == 0
    expected = step_traffic(
        run_shape(config, read_spec(config.source.path)),
        workload_of(config),
        degrees_of(config, gpus=world_size),
        padded_rows=_padded_rows(config),
    )
    if optimizer == "muon":
        expected = padded_gathers(expected, config, degrees_of(config, gpus=world_size))
    assert counted == {" ".join(key): count for key, count in expected.items()}


def padded_gathers(expected: Traffic, config: RunConfig, degrees: Degrees) -> Traffic:
    """Add what a CPU pads: gloo gathers equal parts, and replicas update unequal numbers."""
    if degrees.dp * degrees.cp == 1:
        return expected
    shape, work = run_shape(config, read_spec(config.source.path)), workload_of(config)
    padded = dict(expected)
    for pp_rank in range(degrees.pp):
        chunks = rank_tensors(shape, degrees, pp_rank=pp_rank)
        trained = [t for chunk in chunks for t in chunk if not work.frozen.covers(t.part)]
        for group, count in (("dp_cp", degrees.dp * degrees.cp), ("edp", degrees.edp)):
            of_experts = group == "edp"
            shares = [
                sum(t.numel
                    for t in kept_tensors(trained, degrees, replica=i, expert_replica=i)
                    if (t.expert and has_own_replicas(degrees)) == of_experts)
                for i in range(count)
            ]  # fmt: skip
            missing = count * max(shares) - sum(shares)
            if missing:
                ranks = degrees.gpus // degrees.pp
                padded[group, "all_gather"] += ranks * missing * work.bytes_per_value
    return padded


def _padded_rows(config: RunConfig) -> int | None:
    """Rows a rank sends of a micro-batch: tokens / tp * K * factor, in E equal parts."""
    if not config.moe.moe_pad_expert_input_to_capacity:
        return None
    tokens = config.data.seq_length // config.parallel.tensor_parallel_size
    factor = config.moe.moe_expert_capacity_factor
    assert factor is not None
    return int(tokens * config.moe.moe_router_topk * factor)


def _count(world: World, config: RunConfig, out: Path) -> None:
    from megatron_moe.bench.traffic import step_bytes

    total = step_bytes(config, world)
    if world.rank == 0:
        out.write_text(json.dumps({" ".join(key): count for key, count in total.items()}))


def test_what_must_leave_a_rank():
    """Of a whole on two ranks half travels to each; a sum, there and back; what is sent, all."""
    degrees = Degrees(gpus=8, tp=2, pp=2)
    traffic = {("tp", "all_gather"): 800, ("tp", "all_reduce"): 80, ("pp", "send"): 16}
    assert sent_per_rank(traffic, degrees) == {"tp": 50 + 10, "pp": 2}
