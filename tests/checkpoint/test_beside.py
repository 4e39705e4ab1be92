"""Tests that a background save stores the state of its step, not that of later steps."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import save_dense
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint import sharded
from megatron_moe.train import state as train_state

pytestmark = pytest.mark.distributed


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return tree(
        tmp_path / "run",
        save_dense(tmp_path / "dense"),
        write_tokens(tmp_path / "tokens"),
        # Expert biases change before the optimizer updates the weights.
        moe={
            "num_moe_experts": 4,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
        train={"steps": 3, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"lr": 1e-2, "warmup_steps": 0},
    )


def saved(settings: dict[str, Any], run: Path, step: int) -> dict[str, Tensor]:
    settings["run"]["dir"] = str(run)
    run_training(settings, world_size=2)
    (folder,) = (run / "checkpoints").glob(f"step_*{step}")
    reader = FileSystemReader(folder)
    stored: Any = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in stored.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert torch.equal(tensor, expected[key]), key


def test_no_update_overtakes_the_copies(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings["checkpoint"] = {"interval": 1, "keep": 3}
    wanted = saved(settings, tmp_path / "sync", step=2)
    copy = sharded._copied_to_host

    def slow_copy(boxes: Any, which: Any) -> Any:
        if which is not sharded._only_small:
            time.sleep(1)  # so that an update without a wait would come first
        return copy(boxes, which)

    monkeypatch.setattr(sharded, "_copied_to_host", slow_copy)
    monkeypatch.setattr(sharded, "_SMALL_BYTES", 1024)  # because the whole model is small
    settings["checkpoint"]["async_save"] = True
    assert_same(saved(settings, tmp_path / "async", step=2), wanted)


def test_weights_are_gathered_before_they_are_saved(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Use the overlapped gather of CUDA, which would wait for the next forward pass."""
    settings["train"]["steps"] = 1
    wanted = saved(settings, tmp_path / "gathered", step=1)
    monkeypatch.setattr(train_state, "_overlaps_gather", lambda config, engine: True)
    assert_same(saved(settings, tmp_path / "overlapped", step=1), wanted)
