"""Moments in bf16 or in host memory: layouts, resumes, and what a checkpoint holds.

The kernel's arithmetic is in tests/runtime/test_adamw.py, the bytes are in tests/test_dry_run.py.
"""

import shutil
from typing import Any

import pytest
import torch
from training_runs import Runs, make_runs, read_metrics

from megatron_moe.checkpoint.folder import step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors

pytestmark = pytest.mark.distributed
BF16 = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
HOST = {"optimizer_cpu_offload": True}
EVERY_STEP = {"interval": 1, "keep": 100}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("moments"), common={"checkpoint": EVERY_STEP})


def trained(
    runs: Runs, where: str, layout: str, optimizer: dict[str, Any], precision: str = "bf16"
) -> list[dict[str, Any]]:
    """The metrics of four steps, of a run that another test may have made."""
    if not (runs.root / where / "metrics.jsonl").exists():
        train = {"steps": 4, "precision": precision}
        runs.train(where, layout, train=train, optimizer=optimizer)
    return read_metrics(runs.root / where)


def resumed(runs: Runs, of: str, where: str, layout: str, **optimizer: Any) -> list[dict[str, Any]]:
    """The metrics of steps 3 and 4, taken anew from the checkpoint of step 2."""
    shutil.copytree(runs.root / of, runs.root / where)
    (runs.root / where / "checkpoints" / "latest").write_text("step_00000002\n")
    train = {"steps": 4, "precision": "bf16"}
    return runs.train(where, layout, train=train, optimizer=optimizer)[3:]


@pytest.mark.parametrize(
    "layout", ["dp2 ep2", pytest.param("tp2 replicated", marks=pytest.mark.slow)]
)
def test_moments_in_host_memory_change_no_bit(runs: Runs, layout: str):
    plain = trained(runs, f"plain {layout}", layout, {})
    ours = trained(runs, f"host {layout}", layout, HOST)
    for one, other in zip(ours, plain, strict=True):
        for key in ("loss/lm", "grad_norm"):
            assert one.get(key) == other.get(key), key
    expected, tensors = (runs.tensors(f"{name} {layout}", 4) for name in ("plain", "host"))
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", ["tp2 dp2 ep2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_moments_in_bf16_under_a_layout_equal_those_of_one_rank(runs: Runs, layout: str):
    """Another order of fp32 sums may round a moment to its neighbor, 2^-8 away.

    That moves one of four updates of 1e-3 by 4e-6 of a weight: 2e-5 of a loss.
    """
    expected = trained(runs, "one", "1", BF16, "fp32")
    for ours, one in zip(trained(runs, layout, layout, BF16, "fp32")[1:], expected[1:],
                         strict=True):  # fmt: skip
        assert ours["loss/lm"] == pytest.approx(one["loss/lm"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(BF16, marks=pytest.mark.slow, id="bf16"),
        pytest.param(BF16 | HOST, id="bf16-host"),
    ],
)
def test_a_resume_is_the_uninterrupted_run(runs: Runs, optimizer: dict[str, Any]):
    """Under the same layout to the last bit; under another as in test_resume.py for bf16."""
    where = f"whole {len(optimizer)}"
    whole = trained(runs, where, "dp2 ep2", optimizer)[3:]
    same = resumed(runs, where, f"{where} same", "dp2 ep2", **optimizer)
    moved = resumed(runs, where, f"{where} moved", "tp2", **optimizer)
    for expected, ours, other in zip(whole, same, moved, strict=True):
        for key in ("loss/lm", "grad_norm"):
            assert ours[key] == expected[key]
            assert other[key] == pytest.approx(expected[key], rel=2e-2)
    last = runs.tensors(where, 4)
    again = runs.tensors(f"{where} same", 4)
    assert all(torch.equal(again[key], last[key]) for key in last)
    with GlobalTensors(step_folder(runs.root / where, 4)) as stored:
        dtypes = {key.split(".")[1]: stored.shape_and_dtype(key)[1] for key in stored.names
                  if key.startswith("optimizer.")}  # fmt: skip
    bf16 = torch.bfloat16
    assert dtypes == {"exp_avg": bf16, "exp_avg_sq": bf16, "master": torch.float32}


def test_a_resume_may_change_the_dtype(runs: Runs):
    """The moments of the checkpoint are rounded once, to the nearest bf16 number, or widened."""
    where = "plain dp2 ep2"
    trained(runs, where, "dp2 ep2", {})
    resumed(runs, where, "to bf16", "dp2 ep2", **BF16)
    resumed(runs, "to bf16", "to fp32", "dp2 ep2")
    assert {line["step"] for line in read_metrics(runs.root / "to fp32")} == {0, 1, 2, 3, 4}
    table = (runs.root / "to bf16" / "resumed.jsonl").read_text()
    assert "optimizer.exp_avg_dtype" in table
    assert "takes effect" in table
