"""Load a Hugging Face folder with transformers, which shares no code with this package's models.

The one place that silences the progress bars of transformers ("Loading weights"): they are written
to standard error among our own lines, once per rank.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import INDEX_FILE, SINGLE_FILE, index_of_shards
from megatron_moe.regular_file import regular

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

    Raises:
        CheckpointError: transformers does not accept the folder.
    """
    from transformers import AutoModelForCausalLM  # imported here: slow, and most commands skip it

    silence_progress_bars()
    try:
        for path in folder.iterdir():
            if path.exists():
                regular(path)
        with _indexed(folder) as loadable:
            model: Any = AutoModelForCausalLM.from_pretrained(
                loadable,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,  # code beside the weights is not executed
                use_safetensors=True,
                attn_implementation="sdpa",  # config.json may name one that is not installed
            )
    except Exception as error:  # each field of a config has a check of its own exception
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    model.config.return_dict = True  # config.json may ask for tuples
    return model.to(device).eval()


@contextlib.contextmanager
def _indexed(folder: Path) -> Iterator[Path]:
    """Yield a folder with an index of shards, which transformers needs: ``folder``, or links."""
    known = (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()
    file_of = None if known else index_of_shards(folder)
    if file_of is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="megatron-moe-") as name:
        links = Path(name)
        for path in folder.iterdir():
            (links / path.name).symlink_to(path.resolve())
        index = {"metadata": {}, "weight_map": file_of}
        (links / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
        yield links
