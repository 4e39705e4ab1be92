"""Every configuration for H100s with Transformer Engine's layers, against the planner."""

import json
from pathlib import Path

import pytest
from dense_models import DENSE_MODELS, H100_FILES, shipped

from megatron_moe.commands.dry_run import dry_run
from megatron_moe.planner.parameters import rank_tensors
from megatron_moe.planner.shape import upcycled_shape

pytestmark = pytest.mark.te


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
