"""Tests of Llama 3.1's rotary frequencies against transformers."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_moe.hf.rope import RopeScaling
from megatron_moe.model.rope import scaled_frequencies


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high", "original"),
    [
        pytest.param(128, 5e5, 8.0, 1.0, 4.0, 8192, id="llama-3.1-8b"),
        pytest.param(64, 5e5, 32.0, 1.0, 4.0, 8192, id="llama-3.2-1b"),
        pytest.param(16, 1e4, 4.0, 1.0, 4.0, 16, id="tiny"),
        pytest.param(128, 1e4, 2.5, 2.0, 3.0, 4096, id="narrow-band"),
        pytest.param(128, 1e6, 16.0, 0.5, 32.0, 32768, id="wide-band"),
    ],
)
def test_frequencies_are_transformers(head_dim, theta, factor, low, high, original):
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    expected_C, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain_C = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    ours_C = scaled_frequencies(plain_C, base=1.0, scaling=RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high,
        original_max_position_embeddings=original,
    ))  # fmt: skip
    assert attention_factor == 1.0
    torch.testing.assert_close(ours_C, expected_C, rtol=1e-6, atol=0)
    assert ours_C[-1] == pytest.approx(plain_C[-1] / factor), "the longest wave is slowed in full"
    assert ours_C[0] == plain_C[0] or original == 16, "the shortest is not"
