"""Shapes of published models, by name, for planning before anything is downloaded.

``known_models.yaml`` holds the facts. A model is found by its short name (llama-3-8b), by its name
on the Hugging Face hub, or by a folder that is called like one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_moe.errors import ConfigError

_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A published model."""

    name: str
    hub: str | None
    """Name on the Hugging Face hub; None if it was not published."""
    parameters: int | None
    """Number of different weights, tied ones counted once; None if not known. Typed from memory, as
    the shape is; a test requires that both agree."""
    config: Mapping[str, Any]
    """The part of config.json that determines what is computed."""

    @property
    def folder_name(self) -> str:
        """Last part of the name on the hub, as folders are usually called."""
        return self.name if self.hub is None else self.hub.rpartition("/")[2]


@cache
def known_models() -> dict[str, KnownModel]:
    """Return all known models by their short names."""
    text = Path(__file__).with_name("known_models.yaml").read_text(encoding="utf-8")
    rows = yaml.safe_load(text)["models"]
    return {name: _model(name, dict(row)) for name, row in rows.items()}


def known_model(name: str) -> KnownModel | None:
    """Return the model of a short name, a hub name or a folder's path; None if there is none."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    wanted = {name.lower(), last}
    for model in known_models().values():
        if wanted & {model.name, (model.hub or model.name).lower(), model.folder_name.lower()}:
            return model
    return None


def model_named(name: str) -> KnownModel:
    """Return the dense or MoE model of a name.

    Raises:
        ConfigError: No model has this name; the message lists similar ones.
    """
    model = known_model(name)
    if model is None:
        names = list(known_models())
        close = difflib.get_close_matches(name.rpartition("/")[2].lower(), names, n=3, cutoff=0.4)
        raise ConfigError(
            f"{name} is neither a Hugging Face folder nor the name of a known model.\n"
            f"  similar names: {', '.join(close) or 'none'}\n"
            f"  known: {', '.join(names)}"
        )
    return model


def _model(name: str, row: dict[str, Any]) -> KnownModel:
    hub, parameters = row.pop("hub"), row.pop("parameters")
    config = row | dict(zip(_SIZES, row.pop("sizes"), strict=True))
    return KnownModel(name=name, hub=hub, parameters=parameters, config=config)
