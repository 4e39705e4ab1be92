"""Test that a tiny GGUF, written like llama.cpp's, is converted to the original model."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_llama import convert, unpermute
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.spec import read_spec

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS = 2, 64, 96, 4, 2
TOKENS = ["<end>", "<start>", *"0123456789ab", "\u0120", "\u0120\u0120", "ab"]  # \u0120: a space
MERGES = ["\u0120 \u0120", "a b"]
GGUF_NAME = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Permute rows as llama.cpp does (convert_hf_to_gguf.py, LlamaModel.permute)."""
    shape = weight.shape
    weight = weight.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return weight.swapaxes(1, 2).reshape(shape)


def gguf_name(name: str) -> str:
    parts = name.split(".")
    layer = f"blk.{parts[2]}." if "layers" in parts else ""
    return f"{layer}{GGUF_NAME[parts[-2]]}.weight"


@dataclass
class Tiny:
    gguf: Path
    model: LlamaForCausalLM


def tiny(folder: Path, *, tied: bool, architecture: str = "llama", pre: str = "smollm") -> Tiny:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_name("tiny")
    add_vocabulary(writer, pre)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permute(array, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(folder / "tiny.gguf", model)


def add_vocabulary(writer: gguf.GGUFWriter, pre: str) -> None:
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([control, control] + [normal] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_come_back_to_the_last_bit(tmp_path: Path, tied: bool):
    source = tiny(tmp_path, tied=tied)
    convert(source.gguf, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = {k: v for k, v in source.model.state_dict().items() if not (tied and "lm_" in k)}
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(written[name], weight), name


def test_weights_are_those_of_transformers_own_loader(tmp_path: Path):
    source = tiny(tmp_path, tied=True)
    convert(source.gguf, tmp_path)
    oracle = load_gguf_checkpoint(source.gguf, return_tensors=True, model_to_load=source.model)
    written = load_file(tmp_path / "model.safetensors")
    for name, weight in oracle["tensors"].items():
        assert torch.equal(written[name], torch.as_tensor(weight)), name


def test_config_says_what_the_gguf_says(tmp_path: Path):
    convert(tiny(tmp_path, tied=True).gguf, tmp_path)
    spec = read_spec(tmp_path)
    assert (spec.num_layers, spec.hidden_size, spec.ffn_hidden_size) == (LAYERS, HIDDEN, FFN)
    assert (spec.num_attention_heads, spec.num_query_groups) == (HEADS, KV_HEADS)
    assert (spec.layernorm_epsilon, spec.rotary_base) == (1e-5, 5000.0)
    assert spec.tied_embeddings
    assert (spec.bos_token_id, spec.eos_token_id) == (1, 0)


def test_tokenizer_cuts_digits_first_so_that_spaces_before_them_stay_together(tmp_path: Path):
    convert(tiny(tmp_path, tied=True).gguf, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("ab  12<end>") == ["ab", "\u0120\u0120", "1", "2", "<end>"]
    assert tokenizer.decode(tokenizer("ab  12").input_ids) == "ab  12"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<end>")
    assert tokenizer.chat_template == "{{ messages }}"


def test_unpermute_undoes_permute_per_head():
    weight = np.arange(24.0, dtype=np.float32).reshape(12, 2)
    assert not np.array_equal(permute(weight, 3), weight)
    assert np.array_equal(unpermute(permute(weight, 3), num_heads=3), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "falcon"}, "holds a 'falcon' model"),
        ({"pre": "llama-bpe"}, "'gpt2' with 'llama-bpe' splitting"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, change: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        convert(tiny(tmp_path, tied=True, **change).gguf, tmp_path)


def test_a_tensor_of_another_kind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(GGUF_NAME, "v_proj", "attn_sinks")
    with pytest.raises(CheckpointError, match=r"(?s)blk\.0\.attn_sinks.*blk\.0\.attn_v"):
        convert(tiny(tmp_path, tied=True).gguf, tmp_path)
