"""Tests that garbage collection runs at fixed steps and that steps leave no tensors to collect."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.commands import pretraining
from megatron_moe.train.garbage import manual_collection


def test_the_collector_is_off_inside_and_as_before_outside():
    assert gc.isenabled()
    with manual_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with manual_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", [{}, {"pipeline_parallel_size": 2}], ids=["1", "pp2"])
def test_steps_leave_no_tensors_to_the_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: dict[str, Any]
):
    """A cycle that holds activations would keep them until the next collection."""

    def record_garbage(numbers: dict[str, Any]) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        sizes = [thing.numel() for thing in gc.garbage if isinstance(thing, torch.Tensor)]
        gc.set_debug(0)
        gc.garbage.clear()
        output.write_text(json.dumps([len(sizes), sum(sizes)]))

    output = tmp_path / "tensors"
    monkeypatch.setattr(pretraining, "INTERVAL", 3)
    monkeypatch.setattr(pretraining, "_collect_garbage", record_garbage)
    settings = tree(
        tmp_path / "run", save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens"),
        parallel=parallel, train={"steps": 3, "global_batch_size": 4, "precision": "fp32"},
    )  # fmt: skip
    run_training(settings, world_size=1 + bool(parallel))
    assert json.loads(output.read_text()) == [0, 0]
