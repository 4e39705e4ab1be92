"""Every configuration for H100s with Transformer Engine's layers, against the planner."""

import json
from pathlib import Path
from typing import Any

import pytest
from dense_models import DENSE_MODELS, H100_FILES, shipped

from megatron_moe.commands.dry_run import dry_run
from megatron_moe.config.train import Lora
from megatron_moe.planner.parameters import rank_tensors
from megatron_moe.planner.shape import upcycled_shape

pytestmark = pytest.mark.te
APART = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "optimizer_cpu_offload": True}


@pytest.mark.parametrize("path", H100_FILES, ids=lambda path: path.stem)
def test_h100_configuration(tmp_path: Path, path: Path):
    config, spec, gpus = shipped(path)
    (tmp_path / "config.json").write_text(json.dumps(DENSE_MODELS[config.source.path.name]))
    dense = config.source.model_copy(update={"path": tmp_path})
    config = config.model_copy(update={"source": dense})
    for rank in (0, gpus - 1):
        result = dry_run(config, rank=rank, world_size=gpus)
        assert result.layer_spec == "Transformer Engine"
        assert result.counted == result.planned
        stage = result.groups["pp"].index(rank)
        chunks = rank_tensors(upcycled_shape(spec, config.moe), result.degrees, pp_rank=stage)
        assert result.filled.parameters == sum(map(len, chunks))
        assert result.parameters == sum(tensor.numel for chunk in chunks for tensor in chunk)


@pytest.mark.parametrize("changes", [{"exp_avg_dtype": "bf16"}, APART], ids=["bf16", "host"])
def test_moments_kept_apart_use_the_same_adam_as_without_the_engine(
    tmp_path: Path, changes: dict[str, Any]
):
    """Transformer Engine's FusedAdam would keep them on the GPU; the bytes are the planner's."""
    config, _, gpus = shipped(
        next(path for path in H100_FILES if path.stem.startswith("llama3.2-3b"))
    )
    (tmp_path / "config.json").write_text(json.dumps(DENSE_MODELS[config.source.path.name]))
    dense = config.source.model_copy(update={"path": tmp_path})
    optimizer = config.optimizer.model_copy(update=changes)
    config = config.model_copy(update={"source": dense, "optimizer": optimizer})
    result = dry_run(config, rank=0, world_size=gpus)
    assert result.layer_spec == "Transformer Engine"
    assert result.counted == result.planned
    assert (result.counted.host > 0) == ("optimizer_cpu_offload" in changes)


def test_adapters_of_attention_take_the_planners_bytes(tmp_path: Path):
    config, _, gpus = shipped(
        next(path for path in H100_FILES if path.stem.startswith("llama3.2-3b"))
    )
    (tmp_path / "config.json").write_text(json.dumps(DENSE_MODELS[config.source.path.name]))
    dense = config.source.model_copy(update={"path": tmp_path})
    config = config.model_copy(update={"source": dense, "lora": Lora(rank=16)})
    result = dry_run(config, rank=0, world_size=gpus)
    assert result.layer_spec == "Transformer Engine"
    assert result.counted == result.planned


def test_data_parallelism_treats_delayed_weight_gradients_apart(tmp_path: Path):
    """Gradient buffers and hooks of a rank, for a schedule that runs layers piece by piece."""
    (path,) = [path for path in H100_FILES if path.stem == "llama3-8b-e8t2-dropless-128"]
    config, _, gpus = shipped(path)
    (tmp_path / "config.json").write_text(json.dumps(DENSE_MODELS[config.source.path.name]))
    dense = config.source.model_copy(update={"path": tmp_path})
    overlap = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
    train = config.train.model_copy(update=overlap)
    result = dry_run(
        config.model_copy(update={"source": dense, "train": train}), rank=0, world_size=gpus
    )
    assert result.layer_spec == "Transformer Engine"
    assert result.counted == result.planned
