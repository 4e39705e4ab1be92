"""Generate text from prompts with an exported model, using transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer


@torch.no_grad()
def completions(
    model: Any,
    folder: Path,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield each prompt with the model's continuation.

    Args:
        model: Model from `hf.load.load_model`.
        folder: Folder with its tokenizer.
        prompts: Texts to continue.
        new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 means greedy decoding.
        seed: Sampling seed, reset for each prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **(sampling if temperature else {"do_sample": False}),
        )
        yield tokenizer.decode(ids[0], skip_special_tokens=True)
