"""Replace attributes of torch and Megatron-Core: every replacement goes through `replace`.

An attribute that another version no longer has would otherwise be created by the assignment and
never used. So each is checked to exist, and recorded; a test lists all of them.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.specifiers import SpecifierSet

from megatron_moe.errors import ConfigError

MEGATRON_CORE_VERSIONS = SpecifierSet(">=0.19.2,<0.20")
"""Versions of Megatron-Core that the tests have run with; as in pyproject.toml."""

REPLACED: list[str] = []
"""Full names of the attributes that this process has replaced, in order."""


class PatchError(AssertionError):
    """An attribute to replace does not exist: another version of its package is installed."""


def replace(owner: Any, name: str, replacement: Any, *, optional: bool = False) -> None:
    """Replace an attribute of a module or class for the rest of the process.

    Args:
        owner: The module or class.
        name: The attribute.
        replacement: The new value.
        optional: Whether the attribute may be missing, as a name that a failed import leaves out.

    Raises:
        PatchError: There is no such attribute.
    """
    full_name = f"{_name_of(owner)}.{name}"
    if not optional and not hasattr(owner, name):
        raise PatchError(
            f"{full_name} does not exist, so it cannot be replaced: a version of its package that "
            "was not tested is installed"
        )
    setattr(owner, name, replacement)
    REPLACED.append(full_name)


def _name_of(owner: Any) -> str:
    module = getattr(owner, "__module__", None)
    return f"{module}.{owner.__qualname__}" if module else owner.__name__


def check_megatron_version() -> None:
    """Refuse a version of Megatron-Core that this package has not been tested with.

    Raises:
        ConfigError: Another version is installed.
    """
    version = importlib.metadata.version("megatron-core")
    if not MEGATRON_CORE_VERSIONS.contains(version, prereleases=True):
        raise ConfigError(
            f"megatron-core ({version}) must be a version {MEGATRON_CORE_VERSIONS}: this package "
            "replaces some of its internal functions.\n"
            "  pip install 'megatron-core>=0.19.2,<0.20'"
        )
