"""Test FLOP counts against the figures in papers, and how they scale."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_moe.config.parts import ALL_TRAINED, Frozen
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.flops import forward_flops, step_flops, training_flops
from megatron_moe.planner.parameters import total_parameters
from megatron_moe.planner.shape import MoeShape, source_shape


def teraflops(shape: MoeShape, **kwargs) -> float:
    return forward_flops(shape, sequence_length=4096, **kwargs).model / 1e12


def test_llama_moe_table_3(llama2, llama2_split):
    """Compare with arXiv 2406.16554, table 3: forward, sequence 4096, batch 1."""
    assert f"{teraflops(llama2):.1f}" == "62.9"
    assert f"{teraflops(llama2_split(2, 16)):.1f}" == "31.9"
    assert f"{teraflops(llama2_split(4, 16)):.1f}" == "36.3"
    assert f"{teraflops(llama2_split(2, 8)):.1f}" == "36.3"


def test_llama_3_meets_moe_table_1(llama3, llama3_e8t2):
    """Compare with arXiv 2412.09952, table 1: forward and backward at sequence 8192."""
    dense, moe = (
        training_flops(forward_flops(shape, sequence_length=8192).model)
        for shape in (llama3, llama3_e8t2)
    )
    assert f"{dense:.3e}" == "4.744e+14"
    assert f"{moe:.3e}" == "7.515e+14"


def test_causal_attention_counts_the_triangle_with_its_diagonal(llama2):
    full = forward_flops(llama2, sequence_length=64)
    causal = forward_flops(llama2, sequence_length=64, causal=True)
    assert causal.attention_scores * 2 * 64 == full.attention_scores * 65
    assert full.model - causal.model == full.attention_scores - causal.attention_scores


def test_padding_fills_every_expert_and_is_not_model_flops(llama3_e8t2):
    plain = forward_flops(llama3_e8t2, sequence_length=8192)
    padded = forward_flops(llama3_e8t2, sequence_length=8192, padded_capacity_factor=2.0)
    assert padded.padding == plain.experts  # factor 2: as many rows of zeros as of tokens
    assert padded.model == plain.model
    assert padded.executed == plain.executed + plain.experts
    exact = forward_flops(llama3_e8t2, sequence_length=8192, padded_capacity_factor=1.0)
    assert exact.padding == 0


def test_capacity_rounds_up_to_whole_rows(llama2_split):
    # 10 tokens with 4 of 16 experts: 40 rows for 16 experts, so 3 each, of which 8 are zeros.
    shape = llama2_split(4, 16)
    flops = forward_flops(shape, sequence_length=10, padded_capacity_factor=1.0)
    assert flops.padding == 8 * flops.experts // 40


def test_some_layers_may_stay_dense(llama3, llama3_e8t2):
    mixed = replace(llama3_e8t2, moe_layers=frozenset({0, 31}))
    flops = forward_flops(mixed, sequence_length=128)
    assert flops.dense_ffn == 30 * forward_flops(llama3, sequence_length=128).dense_ffn // 32
    assert flops.experts == 2 * forward_flops(llama3_e8t2, sequence_length=128).experts // 32


@given(batch=st.integers(1, 8), length=st.sampled_from([8, 64, 256]))
def test_batches_add_up(batch, length):
    shape = MoeShape(
        num_layers=2, moe_layers=frozenset({1}), hidden_size=64, ffn_hidden_size=96,
        num_attention_heads=4, num_query_groups=2, kv_channels=16, vocab_size=100,
        num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=48, shared_expert_size=32,
    )  # fmt: skip
    one = forward_flops(shape, sequence_length=length)
    many = forward_flops(shape, sequence_length=length, batch_size=batch)
    assert many.executed == batch * one.executed


def test_agrees_with_torchs_counter_on_mixtral():
    """Compare with the matrix products of Hugging Face's Mixtral, and with its parameters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        architectures=["MixtralForCausalLM"], num_hidden_layers=2, hidden_size=64,
        intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        num_local_experts=4, num_experts_per_tok=2, head_dim=16,
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(32)[None], use_cache=False)
    shape = source_shape(spec_from_config(config.to_dict()))
    assert counter.get_total_flops() == forward_flops(shape, sequence_length=32).executed
    assert total_parameters(shape) == model.num_parameters()


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        ([], ()),
        (["dense_ffn"], ("mlp",)),
        (["attention", "norms"], ("self_attn", "norm")),
        (["embeddings", "dense_ffn"], ("embed_tokens", "lm_head", "mlp")),
    ],
)
def test_a_step_leaves_out_the_weight_gradients_of_frozen_roles(frozen, words):
    """Return torch's count for a step of a partly frozen model, minus that of the whole model."""
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip

    def counted(words: tuple[str, ...]) -> int:
        model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in words))
        ids = torch.zeros(1, 16, dtype=torch.long)
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=embedded).logits.sum().backward()
        return counter.get_total_flops()

    config = LlamaConfig(**sizes).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    shape = source_shape(spec_from_config(config))
    forward = forward_flops(shape, sequence_length=16)
    saved = step_flops(shape, forward, ALL_TRAINED) - step_flops(
        shape, forward, Frozen.named(frozen)
    )
    assert saved == counted(()) - counted(words)
