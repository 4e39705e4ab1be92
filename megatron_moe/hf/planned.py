"""Read the shape of a source model that may not have been downloaded yet.

Planning and dry runs need only a shape. A folder that is not there, but is called like a known
model, gets the known shape (`known.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe.hf.known import KnownModel, known_model
from megatron_moe.hf.obtain import how_to_get
from megatron_moe.hf.spec import ModelSpec, read_spec, spec_from_config
from megatron_moe.json_text import parse_json


def spec_to_plan(folder: Path) -> tuple[ModelSpec, str | None]:
    """Return the shape of the model that belongs into ``folder``.

    Returns:
        The shape, and a note for the user if it was not read from ``folder``.

    Raises:
        CheckpointError: There is no config.json, and no known model of this name.
    """
    model = missing_but_known(folder)
    if model is None:
        return read_spec(folder), None
    name = model.hub or model.name
    note = f"{folder} does not exist. Its shape is taken from the known model {name}.\n"
    return spec_from_config(model.config, where=model.name), note + how_to_get(folder)


def missing_but_known(folder: Path) -> KnownModel | None:
    """Return the known model that a folder without config.json is named after, if any."""
    return None if (folder / "config.json").exists() else known_model(folder.name)


def config_to_plan(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a folder, or of the known model it is named after."""
    model = missing_but_known(folder)
    if model is not None:
        return dict(model.config)
    return parse_json((folder / "config.json").read_text(encoding="utf-8"))
