"""Test the prediction of a whole run against a simulation, brute force and a dry run."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp
from layouts import layout
from tiny import SHAPE
from training_runs import tree

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.check import check_layout
from megatron_moe.planner.epochs import tokens_in
from megatron_moe.planner.run_table import run_rows
from megatron_moe.planner.shape import upcycled_shape
from megatron_moe.planner.whole_run import (
    Circumstances,
    daly_interval,
    expected_seconds,
    source_bytes_read,
    whole_run,
)
from megatron_moe.planner.workload import degrees_of

PAPER = {"context_parallel_size": 2, "pipeline_parallel_size": 4, "expert_parallel_size": 8,
         "virtual_pipeline_parallel_size": 8}  # fmt: skip


@pytest.mark.parametrize(("save", "mtbf"), [(30, 3600), (60, 36_000), (600, 10_800)])
def test_dalys_interval_is_the_minimum_of_his_model(save: float, mtbf: float):
    """Search a grid; the estimate is of third order, so the loss is within 0.1% of the least."""
    grid = np.geomspace(save / 10, 20 * mtbf, 2000)
    least = min(expected_seconds(1e6, x, save, mtbf, 0) for x in grid)
    ours = expected_seconds(1e6, daly_interval(save, mtbf), save, mtbf, 0)
    assert ours <= 1.001 * least


def test_the_expected_time_is_that_of_simulated_failures():
    """Draw Poisson failures; the mean of 2000 runs of 100 intervals has an error of about 0.5%."""
    draw, interval, save, mtbf, restart = random.Random(0), 1000.0, 50.0, 5000.0, 200.0
    total, runs = 0.0, 2000
    for _ in range(runs):
        for _ in range(100):
            need = interval + save
            while (lived := draw.expovariate(1 / mtbf)) < need:
                total += lived
                need = interval + save + restart
            total += need
    model = expected_seconds(100 * interval, interval, save, mtbf, restart)
    # Daly's model repeats restarts that fail, which adds e^(restart / mtbf), here 4%, at most.
    assert total / runs == pytest.approx(model, rel=0.03)


def test_the_numbers_of_a_run(make_config, llama3_spec):
    config = make_config(**PAPER)
    one = check_layout(config, llama3_spec, gpus=128).candidate
    assert one is not None
    run = whole_run(config, llama3_spec, one, Circumstances(price=2.0, mtbf_hours=20))
    assert run.tokens == 1000 * 256 * 8192
    assert run.step_hours == pytest.approx(1000 * one.time.step_seconds / 3600)
    assert run.gpu_hours == pytest.approx(128 * run.hours)
    assert run.cost == pytest.approx(2 * run.gpu_hours)
    assert run.hours == pytest.approx(run.step_hours + run.saving_hours + run.failure_hours)
    assert run.best_hours <= run.hours
    # 47.5 B parameters: bf16 weights, fp32 master weights, two fp32 moments.
    assert run.checkpoint_bytes == pytest.approx(47.49e9 * 14, rel=1e-3)
    assert (run.num_checkpoints, run.disk_bytes) == (1, run.checkpoint_bytes)
    assert json.loads(json.dumps(run.to_json()))["epochs"][0]["epochs"] is None
    rarer = whole_run(config, llama3_spec, one, Circumstances(mtbf_hours=200))
    assert rarer.best_interval > run.best_interval
    assert rarer.failure_hours < run.failure_hours
    saved = config.checkpoint.model_copy(update={"async_save": True})
    background = config.model_copy(update={"checkpoint": saved})
    assert whole_run(background, llama3_spec, one, Circumstances()).saving_hours == 0


def test_failures_more_frequent_than_checkpoints_do_not_overflow(make_config, llama3_spec):
    config = make_config(**PAPER)
    one = check_layout(config, llama3_spec, gpus=128).candidate
    assert one is not None
    run = whole_run(config, llama3_spec, one, Circumstances(mtbf_hours=1e-4))
    json.dumps(run.to_json(), allow_nan=False)
    assert ("failures", "lost: centuries") in [
        (name, value[value.index("lost") :] if "lost" in value else value)
        for name, value in run_rows(run)
    ]


def test_epochs_are_counted_from_token_files(tmp_path: Path, make_config, llama3_spec):
    from training_runs import write_tokens

    prefix = write_tokens(tmp_path / "tokens")
    available = tokens_in(prefix)
    assert available is not None
    assert available > 0
    assert tokens_in(tmp_path / "absent") is None
    config = make_config(**PAPER)
    one = check_layout(config, llama3_spec, gpus=128).candidate
    assert one is not None
    half = {"weight": 0.5, "path": str(prefix)}
    data = build(type(config.data), {"domains": {"a": half, "b": half | {"path": "none"}}})
    data = data.model_copy(update={"seq_length": 8192})
    run = whole_run(config.model_copy(update={"data": data}), llama3_spec, one, Circumstances())
    first, second = run.epochs
    assert first.epochs == pytest.approx(run.tokens / 2 / available)
    assert second.epochs is None


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2 pp2 ep2", "ep4 dp4"])
def test_bytes_of_the_dense_model_are_those_that_ranks_read(tmp_path: Path, name: str):
    """Compare with the dry run of every rank, in a child because it replaces functions of torch."""
    world_size, parallel = layout(name)
    dense = tmp_path / "dense"
    dense.mkdir()
    shape = SHAPE | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (dense / "config.json").write_text(json.dumps(shape))
    settings = tree(tmp_path, dense, tmp_path, parallel=parallel, moe={"num_moe_experts": 8},
                    train={"global_batch_size": 32})  # fmt: skip
    config = build(RunConfig, settings)

    def check(_: int) -> None:
        from megatron_moe.commands.dry_run import dry_run

        read = sum(
            dry_run(config, rank=rank, world_size=world_size).filled.bytes_read
            for rank in range(world_size)
        )
        degrees = degrees_of(config, gpus=world_size)
        ours = source_bytes_read(upcycled_shape(read_spec(dense), config.moe), degrees)
        # Routers are not read, and padding of the vocabulary is not in the file.
        assert ours == pytest.approx(read, rel=0.03)

    mp.start_processes(check, nprocs=1, start_method="fork")
