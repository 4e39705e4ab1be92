"""Dense models to measure with: random weights of a shape, or a file with nothing in it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from megatron_moe.hf.header import SINGLE_FILE
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.hf.writer import FolderWriter

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def config_of(
    *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """The config.json of a Llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "initializer_range": 0.02, **more,
    }  # fmt: skip


def random_dense(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A folder of random weights; the same for the same sizes."""
    tensors = dict(dense_tensors(spec_from_config(config)))
    generator = torch.Generator().manual_seed(0)
    with FolderWriter(folder, {name: (shape, dtype) for name, shape in tensors.items()}) as writer:
        for name, shape in tensors.items():
            ones = len(shape) == 1
            value = torch.ones(shape) if ones else torch.randn(shape, generator=generator) * 0.02
            writer.write(name, value.to(dtype))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sparse_dense(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder as large as the model and as small as its header: a sparse file reads as zeros."""
    header, end = {}, 0
    for name, shape in dense_tensors(spec_from_config(config)):
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    encoded = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
