"""What an exported model says: transformers loads it, and goes on with a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def load_model(
    folder: Path, *, device: Literal["cpu", "cuda"], dtype: torch.dtype | None = None
) -> Any:
    """The model of a Hugging Face folder, as transformers makes it of its config.json.

    Args:
        folder: What `export` writes.
        device: Where it runs.
        dtype: In which precision; None: that of the folder.
    """
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True
    )
    return model.to(device).eval()


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
    """Each prompt and what the model goes on with, one after the other.

    Args:
        model: Of `load_model`.
        folder: Where its tokenizer lies.
        prompts: Texts to go on with.
        new_tokens: How long to go on at most.
        temperature: Of the draws; 0 takes the likeliest token always.
        seed: Of the draws, anew for each prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0}
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt").to(model.device)
        torch.manual_seed(seed)
        made = model.generate(
            **given,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **(drawn if temperature else {"do_sample": False}),
        )
        yield tokenizer.decode(made[0], skip_special_tokens=True)
