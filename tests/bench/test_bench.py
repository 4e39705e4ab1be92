"""The benchmark on two CPU ranks against training itself; records, tables and sweeps."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from dense_models import shipped
from ranks import run_on_ranks
from tiny import SHAPE, save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.bench.record import (
    PHASES,
    StepsRecord,
    read_record,
    spread,
    write_record,
)
from megatron_moe.bench.sweep import commands, read_sweep
from megatron_moe.bench.table import tables
from megatron_moe.config.load import build, load
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.runtime.world import World

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "configs" / "sweeps" / "llama3-8b-e8t2-table2-128.yaml"
EP2 = {"expert_parallel_size": 2}


def measured(settings: dict[str, Any], out: Path, **options: Any) -> StepsRecord:
    """The record of two ranks, through its file."""
    config = build(RunConfig, settings)
    run_on_ranks(_measure, config, out, options, world_size=2)
    record = read_record(out)
    assert isinstance(record, StepsRecord)
    return record


def _measure(world: World, config: RunConfig, out: Path, options: dict[str, Any]) -> None:
    from megatron_moe.bench.steps import BenchOptions
    from megatron_moe.commands.bench import bench

    record = bench(config, world, BenchOptions(**options))
    if world.rank == 0:
        write_record(record, out)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A dense model that is a config.json alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shape = SHAPE | {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.mark.distributed
def test_steps_are_those_of_training(tmp_path: Path):
    """The same loss to the last digit, from the same weights and text, after as many steps."""
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    settings = tree(tmp_path / "run", dense, tokens, parallel=EP2, train={"steps": 4})
    metrics = run_training(settings, world_size=2)
    record = measured(settings, tmp_path / "record.json", warmup=1, steps=3)
    assert record.last_loss == metrics[4]["loss/lm"]
    assert (record.weights, record.data, record.capacity) == ("dense checkpoint", "text", None)
    assert record.config == json.loads(build(RunConfig, settings).model_dump_json())
    assert record.layout["ep"] == 2
    assert record.surroundings.ranks == 2
    assert record.surroundings.versions["torch"] == torch.__version__
    # MFU by its own formula, from the numbers of the record.
    formula = record.mfu_is.flops_per_sequence * 4 / record.step_seconds.median / 2
    assert record.mfu.median == pytest.approx(
        formula / record.mfu_is.denominator_flops_per_second, rel=1e-6
    )
    assert record.tokens_per_second_per_gpu.median == pytest.approx(
        4 * 32 / record.step_seconds.median / 2, rel=1e-6
    )
    # The conventions differ in the scores: 32 tokens attend to 32, or to 16.5 on average.
    square = 3 * 4 * (4 * 32 * 32 * 64)  # forward and backward, 4 layers, 8 heads of 8
    more = record.mfu_is.flops_per_sequence_full_attention - record.mfu_is.flops_per_sequence
    assert more == square * (1 - 33 / 64)
    assert record.mfu_full_attention.median / record.mfu.median == pytest.approx(
        record.mfu_is.flops_per_sequence_full_attention / record.mfu_is.flops_per_sequence
    )
    read_back_as_written_by_an_earlier_version(record, tmp_path / "old.json")


def read_back_as_written_by_an_earlier_version(record: StepsRecord, path: Path) -> None:
    """Version 0.1.0 wrote one MFU, with the whole square of the attention scores."""
    old = json.loads(record.model_dump_json())
    of, full = old["mfu_is"], old["mfu_is"].pop("flops_per_sequence_full_attention")
    ratio = full / of["flops_per_sequence"]
    of["flops_per_sequence"] = full
    old["mfu"] = old.pop("mfu_full_attention")
    old["tflops_per_gpu"] = {k: v * ratio for k, v in old["tflops_per_gpu"].items()}
    path.write_text(json.dumps(old))
    read = read_record(path)
    assert isinstance(read, StepsRecord)
    assert read.mfu_full_attention == record.mfu_full_attention
    assert read.mfu.median == pytest.approx(record.mfu.median)
    assert read.tflops_per_gpu.median == pytest.approx(record.tflops_per_gpu.median)
    assert read.mfu_is.flops_per_sequence == record.mfu_is.flops_per_sequence


@pytest.mark.distributed
def test_balanced_random_steps_with_capacity(tmp_path: Path, bare: Path):
    moe = {"num_moe_experts": 4, "moe_expert_capacity_factor": 0.5}
    settings = tree(
        tmp_path / "run", bare, tmp_path / "none", moe=moe, parallel=EP2,
        data={"seq_length": 128}, train={"global_batch_size": 8},
    )  # fmt: skip
    record = measured(
        settings, tmp_path / "record.json", warmup=1, steps=3, random=True, routing="balanced"
    )
    # Of 8 * 128 tokens' choices an expert gets a fourth, give or take sqrt(2048 * 3 / 16) = 20.
    assert record.load_imbalance.median < 1.15
    assert record.capacity is not None
    assert record.capacity.tokens_per_expert == 128 * 2 / 4 * 0.5
    assert record.drop_rate.median == pytest.approx(0.5, abs=0.05)
    assert (record.weights, record.data) == ("random", "random tokens")
    assert record.last_loss == pytest.approx(5.55, abs=0.2)  # ln 257: it knows nothing
    check_phases(record)
    text = tables([record])
    assert "0.5 (megatron: 32 tokens)" in text
    assert all(f"{phase} s" in text for phase in PHASES)


def check_phases(record: StepsRecord) -> None:
    seconds = {phase: value.median for phase, value in record.phases.seconds.items()}
    assert set(seconds) == set(PHASES)
    assert all(value > 0 for value in seconds.values())
    whole = sum(seconds.values())
    assert whole == pytest.approx(record.phases.step_seconds.median, rel=0.25)
    # The named ones are the step; what is left is zeroing, the loss and counting.
    assert seconds["other"] < 0.3 * whole


@pytest.mark.distributed
def test_ranges_change_nothing_and_leave_nothing(tmp_path: Path, bare: Path):
    settings = tree(tmp_path / "run", bare, tmp_path / "none", parallel=EP2)
    run_on_ranks(_watch, build(RunConfig, settings), world_size=2)


def _watch(world: World, config: RunConfig) -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_moe.bench.phases import Stopwatch, watched
    from megatron_moe.bench.steps import Bench, BenchOptions

    it = Bench(config, world, BenchOptions(random=True))
    layers = [
        layer
        for module in it.state.model.modules
        for layer in module.modules()
        if isinstance(layer, MoELayer)
    ]

    def owners() -> list[dict[str, Any]]:
        watched_objects = (schedules, it.state.optimizer, *it.state.wrapped)
        dispatchers = [layer.token_dispatcher for layer in layers]
        result = [*watched_objects, *dispatchers, *(layer.experts for layer in layers)]
        return [{k: id(v) for k, v in vars(one).items() if callable(v)} for one in result]

    before = owners()
    with watched(it.state, Stopwatch(lambda: None)):
        during = owners()
    assert before != during
    assert owners() == before


def test_stopwatch_counts_the_innermost_range(monkeypatch: pytest.MonkeyPatch):
    from megatron_moe.bench import phases

    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    stopwatch = phases.Stopwatch(lambda: None)
    with stopwatch.range("forward"), stopwatch.range("dispatch"):
        pass
    seconds = stopwatch.read()
    assert {k: v for k, v in seconds.items() if v} == {
        "other": 1.0 + 5.0, "forward": 2.0 + 4.0, "dispatch": 3.0,
    }  # fmt: skip


def test_spread_is_linear_between_neighbours():
    one = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (one.median, one.p10, one.p90) == (3.0, 1.4, 4.6)


@pytest.mark.distributed
def test_collectives(tmp_path: Path):
    out = tmp_path / "network.json"
    run_on_ranks(_measure_collectives, out, world_size=2)
    record = read_record(out)
    assert record.kind == "collectives"
    by_size = {t.bytes: t for t in record.timings if t.collective == "all_reduce"}
    assert list(by_size) == [4096, 16384]
    whole = by_size[16384]  # over two ranks every byte crosses once: 2 * (2 - 1) / 2
    assert whole.bus_gb_per_second == pytest.approx(16384 / whole.seconds.median / 1e9)
    output = run_command("bench", "--table", out)
    assert output.returncode == 0, output.stderr
    assert "| all_to_all | all ranks | 2 | 16,384 |" in output.stdout


def _measure_collectives(world: World, out: Path) -> None:
    from megatron_moe.bench.collectives import bench_collectives

    record = bench_collectives(world, largest_bytes=2**14)
    if world.rank == 0:
        write_record(record, out)


def test_the_sweep_has_one_command_a_row():
    sweep = read_sweep(SWEEP)
    lines = commands(sweep)
    assert len(lines) == len(sweep.rows) >= 4
    for row, line in zip(sweep.rows, lines, strict=True):
        variable, sbatch, nodes, _, script, path, *rest = shlex.split(line, comments=True)
        assert (variable, sbatch, nodes) == ("ACTION=bench", "sbatch", "--nodes=16")
        assert (ROOT / script).exists()
        _, _, gpus = shipped(ROOT / path)
        assert gpus == 8 * sweep.nodes
        load(RunConfig, ROOT / path, [part for part in rest if not part.startswith("--")])
        assert rest[-1] == f"--out=runs/table2/{row.name}.json"
        assert line.endswith(
            f"# arXiv 2412.09952, table 2: {row.published_mfu}% MFU, full attention"
        )


def test_a_broken_record_is_named(tmp_path: Path):
    path = tmp_path / "record.json"
    path.write_text('{"kind": "steps", "name": 3}')
    with pytest.raises(ConfigError, match=r"record\.json is not a record of megatron-moe bench"):
        read_record(path)


def test_nothing_or_two_things_to_do_is_refused():
    output = run_command("bench")
    assert output.returncode == 2
    assert "bench needs one of" in output.stderr
