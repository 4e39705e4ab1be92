"""Tokenizers and small folders that several field cases need."""

import sys
from pathlib import Path

import pytest
from tiny import save_tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def library_files() -> list[Path]:
    """Text that is part of every Python installation."""
    import sysconfig

    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory, library_files: list[Path]) -> Path:
    """Folder with a byte-level BPE tokenizer, as Hugging Face writes it."""
    return save_tokenizer(tmp_path_factory.mktemp("bpe"), library_files)
