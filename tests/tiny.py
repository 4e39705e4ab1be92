"""Tiny models with random weights and small tokenizers: real folders, made in a second."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
}
SMALL_IDS = ("phi3", "smollm3", "olmo2")
"""Families whose default token ids are beyond a small vocabulary."""
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2,
    "logits_scaling": 8.0,
}  # fmt: skip
"""As in Granite 3, but for attention, whose 1/64 belongs to a wider head."""


QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MOES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeConfig, Qwen2MoeForCausalLM, {**QWEN_MOE, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN_MOE, "head_dim": 16}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": (FlexOlmoConfig, FlexOlmoForCausalLM,
                  {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        Glm4MoeConfig, Glm4MoeForCausalLM,
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
            },
        },
    ),
}  # fmt: skip

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
    if family in SMALL_IDS:
        settings = {"pad_token_id": 0, "eos_token_id": 2, **settings}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings, initializer_range=0.2)).float()
    _make_constants_tell(model)
    model.save_pretrained(folder)
    return folder


def save_moe(
    folder: Path, family: str, *, stacked: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """Write a random MoE model, in one tensor per expert or in tensors that stack all experts."""
    config_class, model_class, sizes = MOES[family]
    settings = {**SHAPE, "pad_token_id": 0, "eos_token_id": 2, **sizes, **changes}
    if family != "mixtral":
        settings.pop("sliding_window")
    torch.manual_seed(seed)
    model = model_class(config_class(**settings, initializer_range=0.2)).float()
    _make_constants_tell(model)
    model.save_pretrained(folder, save_original_format=not stacked)
    return folder


@torch.no_grad()
def _make_constants_tell(model: Any) -> None:
    """Change what starts as constants: norms, and biases of attention and of experts."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and "inv_freq" not in name:
            tensor.add_(torch.randn_like(tensor) * 0.1)
        assert torch.isfinite(tensor).all(), name


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
