"""Tokenize conversations with the model's chat template, and mark the assistant's tokens.

`data/messages.py` lists the formats. The loss counts on the assistant's messages and on the token
that ends its turn; LLaMA-MoE (arXiv 2406.16554, section 3.4) trains on the responses of ShareGPT
conversations.

On disk a conversation is one document of Megatron's multimodal token file. It has one sequence
per run of tokens of one kind; a sequence's mode is 1 if the loss counts on it, else 0.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe.data.documents import ReadPosition, read_blocks
from megatron_moe.data.files import find_files, format_of
from megatron_moe.data.messages import Dialogue, called_names, parse_dialogue, strings
from megatron_moe.data.tokenizer import auto_tokenizer, backend_of, fingerprint_of
from megatron_moe.errors import DataError
from megatron_moe.hf.disk import write_text


@dataclass(frozen=True, slots=True)
class Conversation:
    """One tokenized conversation."""

    ids: list[int]

    counts: list[bool]
    """Whether the loss counts on each id."""


class ChatTokenizer:
    """Tokenizer and chat template of a dense model's folder."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer and its template, offline and without running code of the folder.

        Raises:
            DataError: The folder has no fast tokenizer, or its tokenizer has no chat template.
        """
        # Any: transformers' type annotations do not cover fast tokenizers.
        self._tokenizer: Any = auto_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {folder} has no chat template.\n"
                "  put the chat_template.jinja to train with into the folder"
            )
        self._backend = backend_of(folder, self._tokenizer)
        added = self._backend.get_added_tokens_decoder()
        special = [token.content for token in added.values() if token.special]
        self._control_tokens = sorted({*special, *self._tokenizer.all_special_tokens})
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.needed_rows = max(i for i in self._piece_ids(added)) + 1
        self.rows: int | None = None
        """Rows of the model's embedding; None if unknown."""
        self.fingerprint: str = fingerprint_of(folder)

    def _piece_ids(self, added: dict[int, Any]) -> Iterator[int]:
        pieces = self._backend.get_vocab(with_added_tokens=False).values()
        return (i for i in pieces if i not in added or not added[i].special)

    def encode(self, dialogue: Dialogue) -> Conversation:
        """Tokenize a conversation and mark the assistant's turns.

        Raises:
            ValueError: The conversation cannot be rendered; the message gives the reason.
        """
        for text in strings([dialogue.messages, dialogue.tools]):
            for token in self._control_tokens:
                if token in text:
                    raise ValueError(f"a message contains the control token {token}")
        text = self._render(dialogue, len(dialogue.messages))
        for name in (name for message in dialogue.messages for name in called_names(message)):
            if name not in text:
                raise ValueError(f"the chat template leaves out the call of the tool {name!r}")
        spans = [
            self._span(text, dialogue, turn)
            for turn, message in enumerate(dialogue.messages)
            if message["role"] == "assistant"
        ]
        encoding = self._backend.encode(text, add_special_tokens=False)
        counts = [
            any(start <= first < end for start, end in spans) for first, _ in encoding.offsets
        ]
        last = max(encoding.ids, default=0)
        if self.rows is not None and last >= self.rows:
            token = self._backend.id_to_token(last)
            raise ValueError(f"no row of the model's embedding for the token {token!r} ({last})")
        return Conversation(encoding.ids, counts)

    def _span(self, text: str, dialogue: Dialogue, turn: int) -> tuple[int, int]:
        """Return start and end of the assistant's ``turn`` in the rendered ``text``."""
        before = self._render(dialogue, turn, add_generation_prompt=True)
        through = self._render(dialogue, turn + 1)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template renders turn {turn + 1} differently when more turns follow, so "
                "the assistant's text of that turn cannot be located in the conversation"
            )
        return len(before), len(through)

    def _render(
        self, dialogue: Dialogue, turns: int, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of the first ``turns`` messages."""
        try:
            return self._tokenizer.apply_chat_template(
                list(dialogue.messages[:turns]),
                tools=dialogue.tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program and can raise any exception
            raise ValueError(f"the chat template rejects the conversation: {error}") from error


def write_conversations(
    path: Path,
    prefix: Path,
    tokenizer: ChatTokenizer,
    *,
    max_malformed: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write the token file ``prefix`` from ``path``.

    Args:
        path: Input file with one conversation per line, or a folder of such files.
        prefix: Pair to write, with modes; the report goes to ``prefix.json``.
        tokenizer: Tokenizer with a chat template.
        max_malformed: Maximum number of malformed conversations to skip.
        on_progress: Called after every conversation.

    Returns:
        ``file:line: reason`` for each conversation that was skipped.

    Raises:
        DataError: More than ``max_malformed`` conversations are malformed, or none is usable.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=True)
    malformed: list[str] = []
    written = 0
    for file, number, line in _lines(path):
        try:
            conversation = tokenizer.encode(parse_dialogue(line))
        except ValueError as error:
            malformed.append(f"{file}:{number}: {error}")
            if len(malformed) > max_malformed:
                raise DataError(
                    f"more than {max_malformed} malformed conversations:\n  "
                    + "\n  ".join(malformed)
                ) from error
            continue
        _add(builder, conversation)
        on_progress()
        written += 1
    if not written:
        raise DataError(f"{path} contains no conversation")
    builder.finalize(f"{prefix}.idx")
    report = json.dumps({"conversations": written, "malformed": malformed}, indent=2)
    write_text(Path(f"{prefix}.json"), report + "\n")
    return malformed


def _add(builder: IndexedDatasetBuilder, conversation: Conversation) -> None:
    marked = zip(conversation.counts, conversation.ids, strict=True)
    for counts, run in groupby(marked, key=lambda pair: pair[0]):
        ids = np.array([token for _, token in run], dtype=np.int64)
        builder.add_item(torch.from_numpy(ids), mode=int(counts))
    builder.end_document()


def _lines(path: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Yield file, number and content of each line that is not blank."""
    files = find_files([path])
    for file in files:
        if format_of(file) != "lines":
            raise DataError(
                f"{file}: conversations must be JSON lines (.jsonl, also .gz, .bz2, .xz, .zst), "
                "because a message is more than text.\n  convert it to JSON lines"
            )
    for block in read_blocks(files, text_key="", start=ReadPosition()):
        for number, line in enumerate(block.records, start=block.first_line):
            assert isinstance(line, bytes)
            if line.removeprefix(BOM_UTF8).strip():
                yield block.path, number, line
