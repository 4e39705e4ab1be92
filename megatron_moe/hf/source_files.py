"""Name the files of a source folder that belong to a model beside its weights."""

from __future__ import annotations

import os
from pathlib import Path

_PATTERNS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
               "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")  # fmt: skip
"""Files of a source folder that an export needs: everything but the weights."""


def source_files(folder: Path) -> list[Path]:
    """Return the files of a source, other than weights, that checkpoints and exports copy."""
    matches = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
    # Folders such as tokenizer_old/ match too, and backups that only their owner may read.
    return sorted(path for path in matches if path.is_file() and os.access(path, os.R_OK))
