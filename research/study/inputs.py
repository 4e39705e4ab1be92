"""Create the inputs of the study: text in three parts, a tokenizer, and small random models.

pretrain   every second document of a domain: training text of the dense model
continue   the other documents: training text of the MoEs, part of it held out
probe      the first of these, in SmolLM2's tokens
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from folders import complete_or_absent
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.mixtures import SLIMPAJAMA
from megatron_moe.data.corpus import tokenize_files
from megatron_moe.data.tokenizer import load_tokenizer

VOCABULARY = 2048
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
PROBE_BYTES = 150_000
TOKENIZER_BYTES = 400_000
"""Bytes of text per domain for training the tokenizer."""


def write_texts(domains: Path, out: Path) -> None:
    """Write ``out``/{pretrain,continue,probe}/DOMAIN.jsonl and the tokenizer ``out``/tokenizer."""
    with complete_or_absent(out) as staging:
        for name in SLIMPAJAMA:
            lines = _lines(domains / f"{name}.jsonl")
            parts = {"pretrain": lines[::2], "continue": lines[1::2]}
            parts["probe"] = list(_up_to(parts["continue"], PROBE_BYTES))
            for part, chosen in parts.items():
                path = staging / part / f"{name}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(line + "\n" for line in chosen), encoding="utf-8")
        train_tokenizer(staging / "pretrain", staging / "tokenizer")


def write_tokens(texts: Path, part: str, tokenizer: Path, out: Path) -> None:
    """Write ``out``/DOMAIN.bin and .idx of one part."""
    with complete_or_absent(out) as staging:
        for name in SLIMPAJAMA:
            tokenize_files(
                [texts / part / f"{name}.jsonl"], staging / name, load_tokenizer(tokenizer)
            )


def random_dense(
    tokenizer: Path, out: Path, *, seed: int, shape: dict[str, Any] | None = None
) -> None:
    """Write a small Llama with random weights; ``shape`` replaces values of `SHAPE`."""
    torch.manual_seed(seed)
    with complete_or_absent(out) as staging:
        config = LlamaConfig(**SHAPE | (shape or {}))
        LlamaForCausalLM(config).float().save_pretrained(staging)
        _add_tokenizer(tokenizer, staging)


def dense_of_one_expert(run: Path, like: Path, out: Path) -> None:
    """Write a trained MoE with one expert as the equivalent dense model.

    Its router always selects the single expert with weight one.
    """
    exported = run / "hf"
    shutil.rmtree(exported, ignore_errors=True)
    export_checkpoint(run, exported)
    weights = {}
    for file in exported.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            before, routed, after = name.partition(".mlp.")
            if not routed:
                weights[name] = tensor
            elif after.startswith("experts.0."):
                weights[f"{before}.mlp.{after.removeprefix('experts.0.')}"] = tensor
    with complete_or_absent(out) as staging:
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(like / "config.json", staging / "config.json")
        _add_tokenizer(like, staging)
    shutil.rmtree(exported)


def _lines(path: Path) -> list[str]:
    # Not splitlines, which also splits at characters that JSON does not escape.
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _up_to(lines: list[str], limit: int) -> Iterator[str]:
    for line in lines:
        limit -= len(line)
        if limit < 0:
            return
        yield line


def train_tokenizer(texts: Path, out: Path) -> None:
    """Train a tokenizer on the beginning of each JSONL file of ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (
        json.loads(line)["text"]
        for path in sorted(texts.glob("*.jsonl"))
        for line in _up_to(_lines(path), TOKENIZER_BYTES)
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(out)


def _add_tokenizer(origin: Path, folder: Path) -> None:
    for path in origin.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
