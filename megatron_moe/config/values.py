"""Types that several sections of a run's settings share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expanded(path: Path) -> Path:
    """Return the path with ``~`` and ``~user`` replaced by a home directory."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"a path whose home directory is known: {error}") from error


HomePath = Annotated[Path, AfterValidator(_expanded)]
Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys and silent type conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True
    )
