"""Test parameter counts against papers, closed forms against lists, and shards against totals."""

from dataclasses import replace

import pytest
import torch
from dense_models import H100_FILES, shipped
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.planner.parameters import (
    active_parameters,
    rank_parameters,
    rank_tensors,
    total_parameters,
)
from megatron_moe.planner.shape import MoeShape, upcycled_shape
from megatron_moe.planner.workload import Degrees

SMALL = MoeShape(
    num_layers=8, moe_layers=frozenset({0, 2, 3, 5, 7}), hidden_size=64, ffn_hidden_size=96,
    num_attention_heads=8, num_query_groups=4, kv_channels=16, vocab_size=1000,
    num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=48, shared_expert_size=32,
    qkv_bias=True, qk_layernorm=True, shared_expert_gate=True,
)  # fmt: skip

LAYOUTS = st.builds(
    lambda tp, cp, pp, vpp, ep, etp: Degrees(
        gpus=tp * cp * pp * ep * etp, tp=tp, cp=cp, pp=pp, vpp=vpp if pp > 1 else 1, ep=ep, etp=etp
    ),
    tp=st.sampled_from([1, 2, 4]),
    cp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2, 4]),
    vpp=st.sampled_from([1, 2]),
    ep=st.sampled_from([1, 2, 8]),
    etp=st.sampled_from([1, 2]),
)


def test_llama_3_e8t2(llama3_e8t2, llama3):
    """Check totals; arXiv 2412.09952 prints 34.4B / 11.8B, counting two of three FFN matrices."""
    assert f"{total_parameters(llama3_e8t2) / 1e9:.1f}" == "47.5"
    assert f"{active_parameters(llama3_e8t2) / 1e9:.1f}" == "13.7"
    assert total_parameters(llama3) == active_parameters(llama3) == 8_030_261_248


def test_splitting_a_dense_ffn_adds_routers_alone(llama2, llama2_split):
    for active, experts in ((2, 16), (4, 16), (2, 8)):
        grown = total_parameters(llama2_split(active, experts)) - total_parameters(llama2)
        assert grown == 32 * 4096 * experts


@given(degrees=LAYOUTS, tied=st.booleans())
@settings(max_examples=60)
def test_ranks_hold_the_whole_model(degrees, tied):
    """Count over all ranks: sharded tensors once, replicated ones once per replica."""
    shape = replace(SMALL, tied_embeddings=tied)
    replicated = {"layernorm", "router", "gate_weight"}
    held = {False: 0.0, True: 0.0}
    for pp_rank in range(degrees.pp):
        for chunk in rank_tensors(shape, degrees, pp_rank=pp_rank):
            for tensor in chunk:
                whole = any(word in tensor.name for word in replicated)
                ways = degrees.ep * degrees.etp if tensor.expert else degrees.tp
                held[tensor.expert] += tensor.numel * (1 if whole else ways)
    copies = (
        1 if not tied or degrees.pp == 1 else 2
    )  # a tied output layer is copied to the last stage
    padding = padded_vocabulary(1000, degrees.tp) - 1000
    embeddings = 2 - tied
    expected = total_parameters(shape) + padding * 64 * (embeddings + copies - 1)
    expected += 1000 * 64 * (copies - 1)
    assert held[False] + held[True] == expected
    assert held[True] == 5 * 8 * 3 * 64 * 48


@given(degrees=LAYOUTS, tied=st.booleans(), rank=st.sampled_from([0, 3]))
@settings(max_examples=60)
def test_closed_form_equals_the_list(degrees, tied, rank):
    targets = ("attention", "experts")
    shape = replace(SMALL, tied_embeddings=tied, lora_rank=rank, lora_targets=targets)
    for pp_rank in range(degrees.pp):
        tensors = [t for chunk in rank_tensors(shape, degrees, pp_rank=pp_rank) for t in chunk]
        assert rank_parameters(shape, degrees, pp_rank=pp_rank) == (
            sum(t.numel for t in tensors if not t.expert),
            sum(t.numel for t in tensors if t.expert),
        )


@pytest.mark.parametrize("axis", ["tp", "pp", "ep", "etp"])
def test_more_ranks_hold_less(axis, llama3_e8t2):
    layouts = [Degrees(gpus=64, **{axis: size}) for size in (1, 2, 4, 8)]
    held = [sum(rank_parameters(llama3_e8t2, d, pp_rank=0)) for d in layouts]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4


def test_the_shape_of_qwen2_57b_a14b_has_its_parameters():
    """All of transformers' but the gates of the shared experts, which a dense model lacks."""
    (path,) = [path for path in H100_FILES if path.stem.startswith("qwen2-7b-e64t8")]
    config, spec, _ = shipped(path)
    shape = upcycled_shape(spec, config.moe)
    published = Qwen2MoeConfig(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=spec.vocab_size, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=2560, shared_expert_intermediate_size=20480,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(published)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert total_parameters(shape) == expected - 28 * 3584
    assert round(total_parameters(shape) / 1e9) == 57
    assert round(active_parameters(shape) / 1e9) == 14
