"""Test the layers of each chunk against Megatron-Core's arithmetic."""

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_moe.parallel.stages import Ends, chunk_layers, is_first, is_last

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
    ends = Ends(first=first_stage, last=last_stage)
    for vpp_rank in range(vpp):
        vp_stage = vpp_rank if vpp > 1 else None
        for pp_rank in range(pp):
            stage = {"pp_rank": pp_rank, "vpp_rank": vpp_rank}
            held = chunk_layers(num_layers=layers, pp=pp, vpp=vpp, ends=ends, **stage)
            first = get_transformer_layer_offset(config, vp_stage, pp_rank)
            count = get_num_layers_to_build(config, vp_stage, pp_rank)
            assert held == range(first, first + count)
            assert is_first(**stage) == (0 in held), "the embedding must be in the chunk of layer 0"
            assert is_last(pp=pp, vpp=vpp, **stage) == (layers - 1 in held)
            seen += held
    assert seen == list(range(layers)), "each layer must be in exactly one chunk, in order"
