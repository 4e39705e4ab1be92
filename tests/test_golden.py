"""What Megatron-Core is told for each shipped configuration, as text that a change must show.

The files of tests/golden hold the fields of ``TransformerConfig`` that differ from Megatron-Core's
own defaults, for every file of configs/h100, as on CUDA, and for settings that none of these files
has (VARIATIONS). A change of a default, of a setting or of
their meaning shows here as a line; if it is meant, ``make golden`` writes them anew.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
VARIATIONS = {
    "llama3-8b-e8t2-dropless-128": {
        "record-routing": ["moe.record_routing=choices"],
        "fp8-tensorwise": ["train.fp8=hybrid"],
        "fp8-blockwise": ["train.fp8=e4m3", "train.fp8_recipe=blockwise"],
        "pipeline-layout": [
            "parallel.pipeline_parallel_size=4",
            "parallel.virtual_pipeline_parallel_size=1",
            "parallel.pipeline_model_parallel_layout=Et*7|t*9|t*9|t*7L",
        ],
        "expert-overlap": [
            "train.overlap_moe_expert_parallel_comm=true",
            "train.delay_wgrad_compute=true",
        ],
    },
    "qwen2-7b-e64t8-qwen-128": {"shared-overlap": ["moe.moe_shared_expert_overlap=true"]},
}
"""Settings to add to a shipped configuration, by its name and a name of their own."""


def described(path: Path, changes: Sequence[str] = ()) -> str:
    """One ``field = value`` a line, sorted."""
    from dense_models import shipped
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moe.config.load import overridden
    from megatron_moe.model.config import transformer_settings
    from megatron_moe.rules.check import check
    from megatron_moe.runtime.engine import TRANSFORMER_ENGINE

    config, spec, gpus = shipped(path)
    if changes:
        config = overridden(config, changes)
        check(config, spec, gpus)
    settings = transformer_settings(config, spec, engine=TRANSFORMER_ENGINE)
    defaults = {field.name: default(field) for field in fields(TransformerConfig)}
    lines = [
        f"{name} = {shown(value)}" for name, value in settings.items() if value != defaults[name]
    ]
    return "\n".join(sorted(lines)) + "\n"


def default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def shown(value: Any) -> str:
    """A function by its name: its address changes from run to run."""
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def golden_files() -> dict[Path, str]:
    """The text of each golden file."""
    from dense_models import H100_FILES

    texts = {GOLDEN / f"{path.stem}.txt": described(path) for path in H100_FILES}
    by_name = {path.stem: path for path in H100_FILES}
    for stem, variations in VARIATIONS.items():
        for name, changes in variations.items():
            texts[GOLDEN / f"{stem}.{name}.txt"] = described(by_name[stem], changes)
    return texts


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return golden_files()


def test_settings_of_megatron_are_those_of_the_golden_files(texts: dict[Path, str]):
    changes = []
    for golden, text in texts.items():
        expected = golden.read_text() if golden.exists() else ""
        changes += difflib.unified_diff(
            expected.splitlines(), text.splitlines(), golden.name, "now", lineterm="", n=0
        )
    assert not changes, "\n".join([*changes, "if this is meant: make golden"])


def test_there_is_no_golden_file_without_a_configuration(texts: dict[Path, str]):
    assert set(GOLDEN.iterdir()) == set(texts)


def main() -> None:
    """Write all golden files anew."""
    from megatron_moe.runtime import cpu

    cpu.install()
    texts = golden_files()
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for path, text in texts.items():
        path.write_text(text)
    print(f"wrote {len(list(GOLDEN.iterdir()))} files to {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()
