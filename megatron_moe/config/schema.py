"""The JSON schema of a run's YAML file, for editors."""

from __future__ import annotations

from typing import Any

from megatron_moe.config.run import RunConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12): types, choices, defaults and descriptions of all settings.

    It cannot express rules that look at several settings or at the dense model; `rules.check` does.
    """
    return {"$schema": DRAFT, **RunConfig.model_json_schema(), "title": "megatron-moe run"}
