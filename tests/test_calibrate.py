"""``plan --calibrate``: records of a known cluster give its constants back."""

import json
import sys
from dataclasses import asdict, astuple
from pathlib import Path

import pytest
from dense_models import DENSE_MODELS

from megatron_moe.bench.record import (
    PHASES,
    CollectivesRecord,
    Mfu,
    Phases,
    Spread,
    StepsRecord,
    Surroundings,
    write_record,
)
from megatron_moe.cli import main as cli
from megatron_moe.commands.calibrate import calibrate, measured
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.calibration import FITTED, Calibration, read_constants
from megatron_moe.planner.fit import PRIOR_SPREAD

SPEC = spec_from_config(DENSE_MODELS["Meta-Llama-3-8B"])
TRUE = Calibration(gemm_efficiency=0.6, link_efficiency=0.8, layer_overhead_seconds=1.4e-3)
LAYOUTS = (
    {"expert_parallel_size": 8, "pipeline_parallel_size": 4},
    {"expert_parallel_size": 8, "tensor_parallel_size": 8},
    {"expert_parallel_size": 4, "expert_tensor_parallel_size": 4, "tensor_parallel_size": 4},
    {"expert_parallel_size": 8, "tensor_parallel_size": 2, "context_parallel_size": 4},
)


def one(value: float) -> Spread:
    return Spread(median=value, p10=value, p90=value)


def surroundings(device: str, ranks: int, **versions: str) -> Surroundings:
    return Surroundings(
        time="2026-11-29T00:00:00+00:00", command=["bench"], commit=None, uncommitted_changes=None,
        versions={"torch": "2.14.1", **versions}, device=device, device_memory_gib=79.1,
        ranks=ranks, hosts=ranks // 8, environment={},
    )  # fmt: skip


def record_of(path: Path, parallel: dict, *, device: str = "NVIDIA H100 80GB HBM3", **versions):
    """Write a record whose step takes what the time model says with the constants `TRUE`."""
    config = build(RunConfig, {
        "run": {"dir": "run"}, "source": {"path": "dense"}, "moe": {"num_moe_experts": 8},
        "data": {"path": "text", "seq_length": 4096}, "parallel": parallel,
        "train": {"steps": 10, "global_batch_size": 256},
    })  # fmt: skip
    flops = Mfu(formula="", flops_per_sequence=1, flops_per_sequence_full_attention=1,
                denominator_flops_per_second=1, denominator_source="")  # fmt: skip
    fields = {
        "name": path.stem, "surroundings": surroundings(device, 64, **versions),
        "config": config.model_dump(mode="json"), "dense": asdict(SPEC), "layout": {},
        "total_parameters": 1, "active_parameters": 1, "routing": "balanced", "weights": "random",
        "data": "random tokens", "capacity": None, "warmup_steps": 1, "timed_steps": 1,
        "each_step_seconds": [1.0], "step_seconds": one(1.0), "tokens_per_second_per_gpu": one(1.0),
        "tflops_per_gpu": one(1.0), "mfu": one(0.4), "mfu_full_attention": one(0.4),
        "mfu_is": flops, "load_imbalance": one(1.02), "drop_rate": one(0.0),
        "phases": Phases(how="", steps=1, step_seconds=one(1.0),
                         seconds=dict.fromkeys(PHASES, one(0.1))),
        "peak_memory_gib": 1.0, "last_loss": 1.0,
    }  # fmt: skip
    write_record(StepsRecord(**fields), path)
    if "H100" in device:
        seconds = measured(path).predicted(TRUE)
        write_record(StepsRecord(**(fields | {"step_seconds": one(seconds)})), path)
    return path


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    return [
        record_of(tmp_path / f"r{index}.json", parallel, **{"transformer-engine": "2.20"})
        for index, parallel in enumerate(LAYOUTS)
    ]


def test_the_constants_of_the_cluster_come_back(records):
    """The prior pulls a constant by no more than its own spread allows."""
    result = calibrate(records)
    after, before = (max(map(abs, result.errors(c))) for c in (result.constants, FITTED))
    assert before > 0.1
    assert after < 0.02
    for fitted, true, prior in zip(
        astuple(result.constants), astuple(TRUE), astuple(FITTED), strict=True
    ):
        assert abs(fitted - true) < abs(prior - true)
    assert PRIOR_SPREAD == 0.3


def test_plan_uses_the_constants_that_calibrate_writes(records, tmp_path, capsys, monkeypatch):
    file = tmp_path / "constants.json"

    def run(*words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["megatron-moe", "plan", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return json.loads(capsys.readouterr().out)

    report = run("--calibrate", *records, "--constants", file)
    assert report["mean_absolute_error_after"] < report["mean_absolute_error_before"]
    assert len(report["records"]) == 4
    assert read_constants(file) == Calibration(**report["constants"])
    words = ["--model", "llama-3-8b", "--gpus", 64]
    default, own = run(*words), run(*words, "--constants", file)
    assert own["best"][0]["step_seconds"] > default["best"][0]["step_seconds"]


def test_auto_without_transformer_engine_was_torch(tmp_path: Path):
    bare = measured(record_of(tmp_path / "bare.json", LAYOUTS[0]))
    with_te = {"transformer-engine": "2.20"}
    other = measured(record_of(tmp_path / "te.json", LAYOUTS[0], **with_te))
    assert (bare.work.engine, other.work.engine) == ("torch", "transformer_engine")
    assert bare.work.imbalance == 1.02


def test_refusals(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs records of megatron-moe bench"):
        calibrate([])
    cpu = record_of(tmp_path / "cpu.json", LAYOUTS[0], device="CPU, 2 cores (x86_64)")
    with pytest.raises(ConfigError, match=r"was measured on CPU, 2 cores .*\n  known: a100, h100"):
        calibrate([cpu])
    network = CollectivesRecord(surroundings=surroundings("NVIDIA H100", 8), timings=[])
    write_record(network, tmp_path / "network.json")
    with pytest.raises(ConfigError, match="times collectives"):
        calibrate([tmp_path / "network.json"])
    (tmp_path / "bad.json").write_text('{"constants": {"gemm_efficiency": -1}}')
    with pytest.raises(ConfigError, match="holds no constants"):
        read_constants(tmp_path / "bad.json")
    values = asdict(FITTED) | {"gemm_efficiency": -1.0}
    (tmp_path / "bad.json").write_text(json.dumps({"constants": values}))
    with pytest.raises(ConfigError, match=r"gemm_efficiency \(-1.0\) must be positive"):
        read_constants(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="cannot read"):
        read_constants(tmp_path / "absent.json")
