"""Convert a Llama in llama.cpp's GGUF format to a dequantized Hugging Face folder.

    GGUF metadata    ->  config.json, generation_config.json
    GGUF tensors     ->  model.safetensors, fp32: the exact values of the quantized blocks
    GGUF vocabulary  ->  tokenizer.json, tokenizer_config.json, chat_template.jinja

All tensors equal those of transformers' own loader (``gguf_file=``) exactly. This module exists
because that loader needs accelerate and, as of 5.23, does not make the tokenizer split digits.
Only the ``llama`` architecture with a byte-level BPE tokenizer is supported.

Shape letters: H heads (query or KV), D hidden_size, P half a head, the rotary pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from folders import write_json
from gguf import GGUFReader, TokenType, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_moe.errors import CheckpointError

Metadata = Mapping[str, Any]

# fmt: off
_MODEL = {
    "token_embd.weight":  "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight":      "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight":   "input_layernorm.weight",
    "attn_q.weight":      "self_attn.q_proj.weight",
    "attn_k.weight":      "self_attn.k_proj.weight",
    "attn_v.weight":      "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight":    "post_attention_layernorm.weight",
    "ffn_gate.weight":    "mlp.gate_proj.weight",
    "ffn_up.weight":      "mlp.up_proj.weight",
    "ffn_down.weight":    "mlp.down_proj.weight",
}
# fmt: on

# llama.cpp's names of pre-tokenizers. Both split off each digit, and then apply GPT-2's pattern
# (llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
_DIGITS_THEN_GPT2 = ("smollm", "starcoder")


def convert(gguf_path: Path, folder: Path) -> None:
    """Write a Hugging Face folder that ``from_pretrained`` can load without a network.

    Raises:
        CheckpointError: The model is not a Llama, or a tensor or the tokenizer is not supported.
    """
    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if (architecture := metadata["general.architecture"]) != "llama":
        raise CheckpointError(f"{gguf_path} holds a {architecture!r} model; only llama is read")
    config = hf_config(metadata, tied="output.weight" not in {t.name for t in reader.tensors})
    tensors = _tensors(reader, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file makes it readable only by the owner
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _special_ids(metadata))
    _write_tokenizer(metadata, folder)


def hf_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """Return the ``config.json`` for the metadata."""
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "num_hidden_layers": metadata["llama.block_count"],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_special_ids(metadata),
    }


def unpermute(weight: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Return the rows of a q or k projection in Hugging Face's order.

    Rotary embedding rotates pairs of a head's rows. llama.cpp stores the rows of a pair next to
    each other, ``(H, P, 2, D)``; Hugging Face stores all first halves, then all second halves,
    ``(H, 2, P, D)``. A wrong order raises no error; it only makes the model worse.
    """
    rows, D = weight.shape
    pairs_HP2D = weight.reshape(num_heads, rows // num_heads // 2, 2, D)
    return np.ascontiguousarray(pairs_HP2D.swapaxes(1, 2)).reshape(rows, D)


def _tensors(reader: GGUFReader, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    names = _names(config["num_hidden_layers"], tied=config["tie_word_embeddings"])
    actual = {tensor.name for tensor in reader.tensors}
    if wrong := sorted(actual ^ names.keys()):
        raise CheckpointError(
            "the GGUF is not a plain Llama; missing from it or unknown:\n  " + "\n  ".join(wrong)
        )
    result = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if num_heads := heads.get(tensor.name.split(".", 2)[-1]):
            weight = unpermute(weight, num_heads=num_heads)
        result[names[tensor.name]] = weight
    return result


def _names(num_layers: int, *, tied: bool) -> dict[str, str]:
    """Map GGUF names to Hugging Face names, for all tensors that the model must have."""
    names = {ours: theirs for ours, theirs in _MODEL.items() if not (tied and "lm_head" in theirs)}
    for layer in range(num_layers):
        names |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{_LAYER[ours]}" for ours in _LAYER}
    return names


def _write_tokenizer(metadata: Metadata, folder: Path) -> None:
    ids = _special_ids(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": metadata["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        }
        | {key.replace("_id", ""): tokens[value] for key, value in ids.items()},
    )
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokenizer(metadata: Metadata) -> Tokenizer:
    kind, cut = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != "gpt2" or cut not in _DIGITS_THEN_GPT2:
        raise CheckpointError(f"tokenizer {kind!r} with {cut!r} splitting is not known here")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return tokenizer


def _special_ids(metadata: Metadata) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{k}_token_id"] for ours, k in keys.items()
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal of a 32-bit float: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
