"""What Megatron-Core is told for each shipped configuration, as text that a change must show.

The files of tests/golden hold the fields of ``TransformerConfig`` that differ from Megatron-Core's
own defaults, for every file of configs/h100, as on CUDA. A change of a default, of a setting or of
their meaning shows here as a line; if it is meant, ``make golden`` writes them anew.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


def described(path: Path) -> str:
    """One ``field = value`` a line, sorted."""
    from dense_models import shipped
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moe.model.config import transformer_settings
    from megatron_moe.runtime.engine import TRANSFORMER_ENGINE

    config, spec, _ = shipped(path)
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


def golden_of(path: Path) -> Path:
    return GOLDEN / f"{path.stem}.txt"


def files() -> Iterator[Path]:
    from dense_models import H100_FILES

    yield from H100_FILES


@pytest.mark.parametrize("path", list(files()), ids=lambda path: path.stem)
def test_settings_of_megatron_are_those_of_the_golden_file(path: Path):
    golden = golden_of(path)
    expected = golden.read_text() if golden.exists() else ""
    difference = difflib.unified_diff(
        expected.splitlines(), described(path).splitlines(), golden.name, "now", lineterm="", n=0
    )
    changes = "\n".join(difference)
    assert not changes, f"{changes}\nif this is meant: make golden"


def test_there_is_no_golden_file_without_a_configuration():
    assert {path.name for path in GOLDEN.iterdir()} == {golden_of(path).name for path in files()}


def main() -> None:
    """Write all golden files anew."""
    from megatron_moe.runtime import cpu

    cpu.install()
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for path in files():
        golden_of(path).write_text(described(path))
    print(f"wrote {len(list(GOLDEN.iterdir()))} files to {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()
