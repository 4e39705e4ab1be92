"""Tests that each rank gets its own GPU, and that counting GPUs does not initialize CUDA."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_moe.errors import ConfigError
from megatron_moe.runtime.gpus import claim_gpu, gpu_of, visible_gpus


def test_gpus_are_counted_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without NVML, counting initializes the driver, and forked ranks could not use CUDA."""

    def count() -> int:
        (tmp_path / "asked").write_text(str(os.getpid()))
        return 3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count() > 0)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    assert visible_gpus() == 3
    assert int((tmp_path / "asked").read_text()) != os.getpid()


def test_a_driver_that_breaks_the_child_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    def broken() -> bool:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert visible_gpus() == 0


def test_an_initialized_process_is_asked_itself(monkeypatch: pytest.MonkeyPatch):
    """Its children could not count: CUDA does not survive a fork."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert visible_gpus() == 5


@pytest.mark.parametrize(
    ("local_rank", "gpus", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)]
)
def test_the_gpu_of_a_rank(local_rank: int, gpus: int, index: int):
    """The last case is SLURM's --gpus-per-task=1: every task sees its own GPU as number 0."""
    assert gpu_of(local_rank, gpus=gpus) == index


def test_a_rank_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="local rank 2 sees 2") as caught:
        gpu_of(2, gpus=2)
    assert "\n  start at most 2 ranks on this machine" in str(caught.value)


def test_a_gpu_is_taken_once():
    store = dist.HashStore()
    claim_gpu(store, rank=0, uuid="a")
    claim_gpu(store, rank=1, uuid="b")
    claim_gpu(store, rank=0, uuid="a")  # the same rank joins again
    with pytest.raises(ConfigError, match=r"ranks 1 and 2 share one \(GPU-b\)"):
        claim_gpu(store, rank=2, uuid="b")
