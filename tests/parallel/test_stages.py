"""Test the layers of each chunk against Megatron-Core's arithmetic."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_moe.parallel.stages import (
    PipelineSplit,
    chunk_layers,
    is_first,
    is_last,
    layout_blocks,
    stage_sizes,
)  # fmt: skip

CASES = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in [
        (1, 1, 1, None, None), (5, 1, 1, None, None), (4, 2, 1, None, None), (4, 2, 2, None, None),
        (12, 2, 3, None, None), (12, 3, 2, None, None), (16, 4, 4, None, None),
        (32, 8, 1, None, None), (30, 4, 1, 7, 7), (30, 4, 1, 6, None), (31, 4, 1, None, 4),
        (5, 2, 1, 2, None), (5, 2, 1, None, 2), (5, 2, 1, 4, 1), (30, 4, 2, 6, 8), (14, 3, 2, 4, 4),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("layers", "pp", "vpp", "first_stage", "last_stage"), CASES)
def test_chunks_are_megatrons(
    layers: int, pp: int, vpp: int, first_stage: int | None, last_stage: int | None
):
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=first_stage,
        num_layers_in_last_pipeline_stage=last_stage,
    )
    seen = []
    split = PipelineSplit(first=first_stage, last=last_stage)
    for vpp_rank in range(vpp):
        vp_stage = vpp_rank if vpp > 1 else None
        for pp_rank in range(pp):
            stage = {"pp_rank": pp_rank, "vpp_rank": vpp_rank}
            held = chunk_layers(num_layers=layers, pp=pp, vpp=vpp, split=split, **stage)
            first = get_transformer_layer_offset(config, vp_stage, pp_rank)
            count = get_num_layers_to_build(config, vp_stage, pp_rank)
            assert held == range(first, first + count)
            assert is_first(**stage) == (0 in held), "the embedding must be in the chunk of layer 0"
            assert is_last(pp=pp, vpp=vpp, **stage) == (layers - 1 in held)
            seen += held
    assert seen == list(range(layers)), "each layer must be in exactly one chunk, in order"


@pytest.mark.parametrize(
    ("layout", "layers", "pp", "vpp"),
    [("Et|tL", 2, 2, 1), ("Ettt|t*9L", 12, 2, 1), ("E|(tt|)*2t,L", 5, 2, 2),
     ("E,t*3|(tt|)*6,L", 15, 4, 2), ("Et|t*0tt|L", 3, 3, 1)],
)  # fmt: skip
def test_a_manual_layout_is_megatrons(layout: str, layers: int, pp: int, vpp: int):
    config = TransformerConfig(
        num_layers=layers, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype=torch.float32, pipeline_model_parallel_layout=layout,
    )  # fmt: skip
    theirs: Any = config.pipeline_model_parallel_layout
    split = PipelineSplit(layout=layout)
    assert len(layout_blocks(layout)) == pp * vpp
    sizes = [0] * pp
    for pp_rank in range(pp):
        for vpp_rank in range(vpp):
            held = chunk_layers(
                num_layers=layers, pp=pp, vpp=vpp, split=split, pp_rank=pp_rank, vpp_rank=vpp_rank
            )
            count = theirs.layout[pp_rank][vpp_rank].count(LayerType.decoder)
            before = [
                theirs.layout[p][v].count(LayerType.decoder)
                for v in range(vpp)
                for p in range(pp)
                if (v, p) < (vpp_rank, pp_rank)
            ]
            assert held == range(sum(before), sum(before) + count)
            sizes[pp_rank] += count
    assert stage_sizes(layers, pp, split) == sizes


def test_a_layout_that_repeats_without_end_is_refused():
    with pytest.raises(ValueError, match="1000 times, not 99999999999 times"):
        layout_blocks("Et*99999999999|L")
