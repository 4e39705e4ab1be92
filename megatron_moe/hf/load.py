"""Load a Hugging Face folder with transformers, which shares no code with this package's models.

The one place that silences the progress bars of transformers ("Loading weights"): they are written
to standard error among our own lines, once per rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def silence_progress_bars() -> None:
    """Turn the progress bars of transformers and huggingface_hub off in this process."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_model(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype | None = None
) -> Any:
    """Load the causal language model of a Hugging Face folder, for inference.

    Args:
        folder: Folder with config.json and weights; the hub is not asked.
        device: Device to run on.
        dtype: dtype of the weights; None uses that of the folder.
    """
    from transformers import AutoModelForCausalLM  # imported here: slow, and most commands skip it

    silence_progress_bars()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or "auto",
        local_files_only=True,
        trust_remote_code=False,  # code beside the weights is not executed
        use_safetensors=True,
        attn_implementation="sdpa",  # config.json may name one that is not installed
    )
    return model.to(device).eval()
