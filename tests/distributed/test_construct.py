"""What `construct` measures, against transformers with hooks; plan files that train builds from.

The oracle runs the dense model whole, in one process, and sums abs(h * dL/dh) itself.
"""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import run_training, tree, write_tokens
from transformers import AutoModelForCausalLM

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import read_plan, write_plan
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.construction import measuring_violations
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
SHARED = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16}
SHARED["moe_shared_expert_intermediate_size"] = 32
SAMPLES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("construct")
    save_dense(root / "dense", num_hidden_layers=2, hidden_size=32, vocab_size=257)
    write_tokens(root / "tokens")
    return root


def settings(folder: Path, run: Path, **changes: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "moe": SHARED,
        "upcycle": {"method": "sharing_inter", "plan": str(run / "plan.safetensors"),
                    "verify": "never"},
        "measure": {"samples": SAMPLES, "hidden_states": 64, "interval": 3},
        "train": {"steps": 0, "global_batch_size": 4, "precision": "fp32"},
    }  # fmt: skip
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return tree(run, folder / "dense", folder / "tokens", **sections)


PARALLEL = {
    "dp4": {},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "cp2-tp2-ep4": {"context_parallel_size": 2, "tensor_parallel_size": 2,
                    "expert_parallel_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("layout", PARALLEL)
def test_importance_is_what_transformers_says(folder: Path, tmp_path: Path, layout: str):
    config = build(RunConfig, settings(folder, tmp_path, parallel=PARALLEL[layout]))
    run_on_ranks(measure, config, tmp_path, world_size=4)
    result = np.load(tmp_path / "measured.npz")
    assert np.bincount(result["cluster"]).tolist() == [2, 2, 2, 2]
    expected = oracle(folder, result["tokens"], result["cluster"])
    for name in ("importance", "activity"):
        # Sums of some 64 products in fp32, in another order.
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result["inputs"], expected["inputs"], rtol=1e-3, atol=1e-4)


def measure(world: World, config: RunConfig, out: Path) -> None:
    from megatron_moe.commands import construct as command
    from megatron_moe.construct.measure import Measurement, world_sum

    kept: list[Measurement] = []
    solved = command._solved

    def keep(plan: Any, measuring: Measurement, *rest: Any) -> Any:
        kept.append(measuring)
        return solved(plan, measuring, *rest)

    command._solved = keep
    config.run.dir.mkdir(parents=True, exist_ok=True)
    command.construct(config, world)
    result = kept[0].sums
    inputs = world_sum(result.inputs.get(0, torch.zeros(64, 32)))
    if world.size > 1 and config.parallel.pipeline_parallel_size == 1:
        assert 0 in result.inputs
    importance, activity = world_sum(result.importance_LCF), world_sum(result.activity_LCF)
    if world.rank == 0:
        text = kept[0].texts[0]
        tokens = np.stack([text.chunk(i).ids_T for i in range(SAMPLES)])
        cluster = kept[0]._cluster_N
        np.savez(out / "measured.npz", importance=importance, activity=activity, inputs=inputs,
                 tokens=tokens, cluster=cluster)  # fmt: skip


def oracle(folder: Path, tokens_NT: np.ndarray, cluster_N: np.ndarray) -> dict[str, np.ndarray]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    layers, neurons = len(model.model.layers), model.config.intermediate_size
    sums = {name: np.zeros((layers, 4, neurons)) for name in ("importance", "activity")}
    seen: dict[int, torch.Tensor] = {}
    inputs = []
    for i, layer in enumerate(model.model.layers):

        def keep(module, args, i=i):
            args[0].retain_grad()
            seen[i] = args[0]

        layer.mlp.down_proj.register_forward_pre_hook(keep)  # fmt: skip
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0][0, ::4].detach().numpy())
    )
    for ids_T, cluster in zip(tokens_NT, cluster_N, strict=True):
        ids = torch.from_numpy(ids_T.astype(np.int64))
        logits = model(ids[None, :-1]).logits[0]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        for i, h in seen.items():
            assert h.grad is not None
            sums["importance"][i, cluster] += (h * h.grad).abs().sum((0, 1)).detach().numpy()
            sums["activity"][i, cluster] += h.abs().sum((0, 1)).detach().numpy()
    return {**sums, "inputs": np.concatenate(inputs)}


BUILT = {
    "sharing_inner": ({"num_moe_experts": 4, "moe_ffn_hidden_size": 32},
                      {"method": "sharing_inner", "router_init": "centroids"}),
    "sharing_inter": (SHARED, {"rescale": "calibrated"}),
    "weaver": (SHARED, {"method": "weaver"}),
    "split_clustered": ({"num_moe_experts": 4, "moe_ffn_hidden_size": 24},
                        {"method": "split_clustered", "rescale": "calibrated",
                         "rescale_at": "runtime"}),
}  # fmt: skip


@pytest.mark.parametrize("method", BUILT)
def test_train_builds_what_construct_planned(folder: Path, tmp_path: Path, method: str):
    moe, upcycle = BUILT[method]
    changed = settings(folder, tmp_path, upcycle=upcycle)
    changed["moe"] = moe
    config = build(RunConfig, changed)
    assert not list(measuring_violations(config, read_spec(config.source.path)))
    run_on_ranks(plan_only, config, world_size=2)
    assert not list(tmp_path.glob(".plan*")), "nothing is left of the measuring"
    (line,) = run_training(changed, world_size=2)
    assert line["step"] == 0
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    plan = make_expert_plan(read_spec(config.source.path), config.moe, config.upcycle)
    assert config.upcycle.plan is not None
    result = read_plan(config.upcycle.plan, plan, source=None)
    assert receipt["plan_hash"] == result.hash
    if result.recipe.calibrated:
        assert all(0.1 < (table.output_scale or 0) < 10 for table in result.tables.values())


def plan_only(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.construct import construct

    config.run.dir.mkdir(parents=True, exist_ok=True)
    construct(config, world)


def test_a_killed_measurement_resumes(folder: Path, tmp_path: Path):
    config = build(RunConfig, settings(folder, tmp_path))
    with pytest.raises(Exception, match="power failure"):
        run_on_ranks(interrupted, config, world_size=1)
    assert (tmp_path / ".plan.safetensors.measuring" / "latest").exists()
    run_on_ranks(plan_only, config, world_size=1)
    whole = build(RunConfig, settings(folder, tmp_path / "whole"))
    run_on_ranks(plan_only, whole, world_size=1)
    plan = make_expert_plan(read_spec(config.source.path), config.moe, config.upcycle)
    assert config.upcycle.plan is not None
    assert whole.upcycle.plan is not None
    one = read_plan(config.upcycle.plan, plan, source=None)
    other = read_plan(whole.upcycle.plan, plan, source=None)
    assert one.hash == other.hash


def interrupted(world: World, config: RunConfig) -> None:
    from megatron_moe.log import RoundProgress

    def fail(self: Any, done: int, total: int) -> None:
        if done == 11:  # in the second pass, two rounds after what was kept
            raise RuntimeError("power failure")

    RoundProgress.show = fail
    plan_only(world, config)


def test_what_a_sequence_needed_is_freed_with_it(folder: Path, tmp_path: Path):
    """Not when Python's collector next runs: a handful of objects can hold gigabytes."""
    config = build(RunConfig, settings(folder, tmp_path))
    run_on_ranks(counting_activations, config, world_size=1)


def counting_activations(world: World, config: RunConfig) -> None:
    from megatron_moe.log import RoundProgress

    alive: list[int] = []

    def count(self: Any, done: int, total: int) -> None:
        objects = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        alive.append(sum(tensor.grad_fn is not None for tensor in objects))

    RoundProgress.show = count
    gc.disable()
    plan_only(world, config)
    assert len(alive) == 2 * SAMPLES
    assert alive[-1] <= alive[SAMPLES + 1]


def test_a_plan_file_of_something_else_is_refused(folder: Path, tmp_path: Path):
    config = build(RunConfig, settings(folder, tmp_path))
    plan = make_expert_plan(read_spec(config.source.path), config.moe, config.upcycle)
    path = tmp_path / "plan.safetensors"
    with pytest.raises(CheckpointError, match=r"no plan file .*\n.*megatron-moe construct"):
        read_plan(path, plan, source="abc")
    write_plan(path, plan, source="abc")
    read_plan(path, plan, source="abc")
    with pytest.raises(CheckpointError, match="made from another dense model"):
        read_plan(path, plan, source="xyz")
    other = config.upcycle.model_copy(update={"seed": 5})
    with pytest.raises(CheckpointError, match="seed: the file has 0, the configuration 5"):
        read_plan(path, make_expert_plan(read_spec(config.source.path), config.moe, other),
                  source="abc")  # fmt: skip
    path.write_bytes(b"not a plan")
    with pytest.raises(CheckpointError, match="is not a plan file"):
        read_plan(path, plan, source="abc")
