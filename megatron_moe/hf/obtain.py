"""Say how to get a Hugging Face folder that a configuration names and that is not there."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.hf.known import known_model

DEMO_MODEL = "smollm2-135m"


def how_to_get(folder: Path) -> str:
    """Return indented lines with the command that fills ``folder``."""
    if folder.name == DEMO_MODEL:
        return (
            f"  get it:  python tools/get_dense.py {folder}\n"
            "  make demo gets it and the text of configs/demo.yaml"
        )
    model = known_model(folder.name)
    if model is not None and model.hub is None:
        return (
            "  no published model has this shape; plan, train --dry-run and construct --dry-run "
            "need no folder"
        )
    name = f"ORGANIZATION/{folder.name}" if model is None else model.hub
    get = f"  get it:  hf download {name} --local-dir {folder}"
    if model is not None:
        return get
    return (
        f"{get}\n"
        f"  plan, train --dry-run and construct --dry-run read only its config.json:\n"
        f"           hf download {name} config.json --local-dir {folder}"
    )
