"""Count how often a run repeats each text, from the sizes of token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.data import Data
from megatron_moe.config.mixtures import SINGLE, starting_weights
from megatron_moe.errors import ConfigError
from megatron_moe.regular_file import regular

_DTYPE_OFFSET = 17
_BYTES_OF_DTYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of a token by the code in the header of Megatron-Core's ``.idx`` file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """Tokens that a run takes from one text."""

    domain: str
    tokens: int
    """Tokens that the run reads of it."""
    available: int | None
    """Tokens that it has; None if it has not been tokenized yet."""
    epochs: float | None
    """Number of times that it is read; None if `available` is."""


def epochs_of(data: Data, tokens: int) -> tuple[Epochs, ...]:
    """Return the epochs of each domain, with initial weights if the mixture adapts."""
    if data.domains is None:
        return (_one(SINGLE, data.path, tokens),)
    try:
        weights = starting_weights(data)
    except ConfigError:  # reported by the rules
        return ()
    return tuple(
        _one(name, domain.path, round(tokens * weights[name]))
        for name, domain in data.domains.items()
    )


def _one(name: str, path: Path | None, tokens: int) -> Epochs:
    available = None if path is None else tokens_in(path)
    epochs = tokens / available if available else None
    return Epochs(domain=name, tokens=tokens, available=available, epochs=epochs)


def tokens_in(prefix: Path) -> int | None:
    """Return the tokens of ``prefix.bin``, or None if there is no readable pair."""
    try:
        with regular(prefix.with_name(prefix.name + ".idx")).open("rb") as file:
            header = file.read(_DTYPE_OFFSET + 1)
        size = prefix.with_name(prefix.name + ".bin").stat().st_size
    except OSError:
        return None
    if not header.startswith(b"MMIDIDX\0\0") or len(header) <= _DTYPE_OFFSET:
        return None
    width = _BYTES_OF_DTYPE.get(header[_DTYPE_OFFSET])
    return None if width is None else size // width
