"""Tests that only training's micro-batches use the buffers of tensor-parallel overlap."""

from pathlib import Path

import pytest
import torch
from training_runs import tree

from megatron_moe.config.judging import judging
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.model.overlap import without_tp_overlap


class Linear(torch.nn.Module):
    """A layer with the attributes that Transformer Engine's linear layers check."""

    def __init__(self) -> None:
        super().__init__()
        self.ub_overlap_ag_fprop, self.ub_overlap_rs_fprop, self.ub_bulk_dgrad = True, False, True
        self.ub_name = "qkv"


def test_a_pass_of_another_shape_uses_no_buffers_and_training_does_again():
    layer = Linear()
    before = dict(vars(layer))
    with without_tp_overlap([torch.nn.Sequential(layer)]):
        used = {name: value for name, value in vars(layer).items() if name.startswith("ub_")}
        assert used == {
            "ub_overlap_ag_fprop": False, "ub_overlap_rs_fprop": False,
            "ub_bulk_dgrad": False, "ub_name": "qkv",
        }  # fmt: skip
    assert vars(layer) == before
    with pytest.raises(ZeroDivisionError), without_tp_overlap([layer]):
        raise ZeroDivisionError
    assert vars(layer) == before


def test_models_that_do_not_train_are_built_without_overlap(tmp_path: Path):
    from megatron_moe.config.judging import dense_config

    settings = tree(tmp_path, tmp_path, tmp_path, train={"tp_comm_overlap": True})
    config = build(RunConfig, settings)
    assert not judging(config, 1).train.tp_comm_overlap
    assert not dense_config(config).train.tp_comm_overlap
