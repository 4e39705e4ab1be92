"""Test the demo's arithmetic and checks; `make demo` runs the whole demo."""

import io
import json
from dataclasses import replace
from pathlib import Path

import demo
import pytest
import torch
from rich.console import Console

from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig

GOOD = demo.Trained(
    logit_error=2e-4,
    bytes_read=3 * 2**20,
    shard_bytes=2 * 2**20,
    losses={0: 2.8, 24: 2.5},
    tokens_per_second=60.0,
    mfu=0.25,
)
OTHER = replace(GOOD, losses={0: 2.8}, tokens_per_second=None, mfu=None)


def write_run(folder: Path, steps: int) -> None:
    ranks = [{"bytes_read": 10, "parameter_bytes": 20}, {"bytes_read": 30, "parameter_bytes": 40}]
    receipt = {"verification": {"max_logit_error": 1e-5}, "ranks": ranks}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    lines: list[dict[str, float]] = [{"step": 0, "loss/validation": 3.0}]
    lines += [
        {
            "step": step,
            "time/step_seconds": 1.0,
            "throughput/tokens_per_second_per_gpu": 10.0 * step,
            "throughput/mfu": 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]
    lines[-1]["loss/validation"] = 3.0 - steps
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_read_from_its_files(tmp_path):
    write_run(tmp_path, steps=3)
    run = demo.read_run(tmp_path)
    assert (run.bytes_read, run.shard_bytes) == (30, 40)
    assert run.losses == {0: 3.0, 3: 0.0}
    assert run.tokens_per_second == 40.0  # the median step's, of two ranks
    assert run.mfu == pytest.approx(0.2)


def test_a_run_without_steps_has_no_speed(tmp_path):
    write_run(tmp_path, steps=0)
    assert demo.read_run(tmp_path).tokens_per_second is None


def test_numbers_that_agree_pass():
    demo.check(GOOD, OTHER, dense=2.80005, exported=2.50005)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dense": 2.8002}, "losses of step 0 and the dense model differ: 2.800000 and 2.800200"),
        ({"exported": 2.4998}, "the trainer and the export differ"),
        ({"other": replace(OTHER, losses={0: 2.81})}, "step 0 of both layouts differ"),
        ({"other": replace(OTHER, logit_error=0.5)}, "upcycling changed a logit by 5.0e-01"),
        (
            {"trained": replace(GOOD, losses={0: 2.8, 24: 2.9}), "exported": 2.9},
            "24 steps did not lower the loss",
        ),
    ],
)
def test_numbers_that_differ_end_the_demo(changed, message):
    case = {"trained": GOOD, "other": OTHER, "dense": 2.8, "exported": 2.5} | changed
    with pytest.raises(demo.DemoError, match=message):
        demo.check(**case)


def test_the_table_shows_every_number():
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(demo.closing_table(GOOD, OTHER, dense=2.80001, exported=2.50001))
    text = console.export_text()
    for number in ("2.0e-04", "2.80001", "2.80000", "2.50000", "2.50001", "3.0", "60", "25.0%"):
        assert number in text


def test_the_loss_is_the_mean_over_all_tokens():
    class Uniform(torch.nn.Module):
        def forward(self, ids: torch.Tensor):
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 8)})

    loss = demo.mean_loss(Uniform(), torch.randint(8, (3, 5)))
    assert loss == pytest.approx(torch.tensor(8.0).log().item())


def test_the_other_layout_is_an_override_of_the_demos():
    config = load(RunConfig, demo.ROOT / demo.CONFIG, list(demo.OTHER_LAYOUT))
    assert config.run.dir == demo.OTHER
    assert config.parallel.pipeline_parallel_size == 2
    assert load(RunConfig, demo.ROOT / demo.CONFIG).run.dir == demo.RUN


def test_a_command_that_fails_ends_the_demo():
    with pytest.raises(demo.DemoError, match="ended with status 3"):
        demo.run("-c", "raise SystemExit(3)")
