"""Tiny dense models with random weights and small tokenizers: real folders, made in a second."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}

SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 257,  # odd, so that every tp pads it
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


def save_dense(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Write a random dense model and return its folder.

    Weights are ten times the usual size: with the usual 0.02 a layer adds next to nothing to the
    residual stream, and a wrong layer would hide in the tolerance.
    """
    config_class, model_class = FAMILIES[family]
    settings = {**SHAPE, **changes}
    if family not in ("mistral", "phi3"):
        settings.pop("sliding_window")
    if family == "phi3":  # its defaults are ids of a larger vocabulary
        settings = {"pad_token_id": 0, "eos_token_id": 2, **settings}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings, initializer_range=0.2)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start as constants; make them tell
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert torch.isfinite(parameter).all(), name
    model.save_pretrained(folder)
    return folder


TOKENIZER_SIZE = 600
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, files: list[Path], *, chat_template: str | None = None) -> Path:
    """Train a byte-level BPE on ``files`` and write it as Hugging Face does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in files], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder
