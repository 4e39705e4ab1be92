"""Import packages that only some files need."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from megatron_moe.errors import DataError


def package_for(name: str, path: Path) -> Any:
    """Return the module ``name``, which reading ``path`` needs.

    Raises:
        DataError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"{path} needs the package {package}, which is not installed.\n  pip install {package}"
        ) from error
