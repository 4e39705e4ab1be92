"""Say how to get a Hugging Face folder that a configuration names and that is not there."""

from __future__ import annotations

from pathlib import Path

HUB_NAMES = {
    "Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "Meta-Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "Meta-Llama-3-70B": "meta-llama/Meta-Llama-3-70B",
    "Qwen2-7B": "Qwen/Qwen2-7B",
}
"""Names on the Hugging Face hub of the models in configs/, by the name of their folder."""

DEMO_MODEL = "smollm2-135m"


def how_to_get(folder: Path) -> str:
    """Return indented lines with the command that fills ``folder``."""
    if folder.name == DEMO_MODEL:
        return (
            f"  get it:  python tools/get_dense.py {folder}\n"
            "  make demo gets it and the text of configs/demo.yaml"
        )
    name = HUB_NAMES.get(folder.name, f"ORGANIZATION/{folder.name}")
    return (
        f"  get it:  hf download {name} --local-dir {folder}\n"
        f"  plan and train --dry-run read only its config.json:\n"
        f"           hf download {name} config.json --local-dir {folder}"
    )
