"""The JSON schema accepts what loading accepts, and refuses what it refuses."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_moe.config.schema import json_schema

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted((ROOT / "configs").glob("h100/*.yaml")), ROOT / "configs/demo.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_keep_the_schema(path: Path):
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("moe", "num_moe_experts", 0),
        ("moe", "num_experts", 8),
        ("train", "precision", "fp16"),
        ("run", "engine", "apex"),
    ],
)
def test_a_wrong_setting_breaks_the_schema(section: str, name: str, value: Any):
    settings = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    changed = copy.deepcopy(settings)
    changed[section][name] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, json_schema())


def test_every_setting_has_a_description():
    schema = json_schema()
    for name, section in schema["$defs"].items():
        for setting, described in section.get("properties", {}).items():
            assert described.get("description"), f"{name}.{setting}"
