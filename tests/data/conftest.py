"""Real tokenizers, trained in seconds on Python's standard library."""

import json
import sysconfig
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tiny import TOKENIZER_SIZE, save_tokenizer


@pytest.fixture(scope="session")
def library_files() -> list[Path]:
    """About 0.7 MB of Python code that is part of every Python installation."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return sorted(stdlib.glob("*.py"))[:40]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory, library_files: list[Path]) -> Path:
    """Folder with a byte-level BPE tokenizer, as Hugging Face writes it."""
    return save_tokenizer(tmp_path_factory.mktemp("bpe"), library_files)


@pytest.fixture(scope="session")
def sentencepiece_folder(
    tmp_path_factory: pytest.TempPathFactory, library_files: list[Path]
) -> Path:
    """Dense folder as Llama 2 was released: tokenizer.model is its only tokenizer file."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    SentencePieceTrainer.Train(
        input=",".join(str(path) for path in library_files[:10]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=TOKENIZER_SIZE,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentence_length=10_000,
        minloglevel=2,
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
