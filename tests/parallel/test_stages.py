"""Test the layers of each chunk against Megatron-Core's arithmetic."""

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_moe.parallel.stages import chunk_layers, is_first, is_last

CASES = [
    pytest.param(layers, pp, vpp, id=f"L{layers}-pp{pp}-vpp{vpp}")
    for layers, pp, vpp in [
        (1, 1, 1), (5, 1, 1), (4, 2, 1), (4, 2, 2), (12, 2, 3), (12, 3, 2), (16, 4, 4), (32, 8, 1),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("layers", "pp", "vpp"), CASES)
def test_chunks_are_megatrons(layers: int, pp: int, vpp: int):
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype=torch.float32,
    )
    seen = []
    for vpp_rank in range(vpp):
        vp_stage = vpp_rank if vpp > 1 else None
        for pp_rank in range(pp):
            stage = {"pp_rank": pp_rank, "vpp_rank": vpp_rank}
            held = chunk_layers(num_layers=layers, pp=pp, vpp=vpp, **stage)
            first = get_transformer_layer_offset(config, vp_stage, pp_rank)
            count = get_num_layers_to_build(config, vp_stage, pp_rank)
            assert held == range(first, first + count)
            assert is_first(**stage) == (0 in held), "the embedding must be in the chunk of layer 0"
            assert is_last(pp=pp, vpp=vpp, **stage) == (layers - 1 in held)
            seen += held
    assert seen == list(range(layers)), "each layer must be in exactly one chunk, in order"
