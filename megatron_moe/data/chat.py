"""Tokenize conversations with the model's chat template, and mark the assistant's tokens.

Supported formats, one conversation per line: OpenAI's
``{"messages": [{"role": ..., "content": ...}]}`` and ShareGPT's
``{"conversations": [{"from": ..., "value": ...}]}``. The loss counts on the assistant's messages
and on the token that ends its turn; LLaMA-MoE (arXiv 2406.16554, section 3.4) trains on the
responses of ShareGPT conversations.

On disk a conversation is one document of Megatron's multimodal token file. It has one sequence
per run of tokens of one kind; a sequence's mode is 1 if the loss counts on it, else 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe.data.tokenizer import fingerprint_of
from megatron_moe.errors import DataError

Message = Mapping[str, str]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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
        from transformers import AutoTokenizer  # imported here: it takes a second

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise bare Exception for bad files
            raise DataError(f"cannot read the tokenizer of {folder}: {error}") from error
        if not tokenizer.is_fast or not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {folder} has no chat template, or no tokenizer.json.\n"
                "  put the chat_template.jinja to train with into the folder"
            )
        # Any: transformers' type annotations do not cover fast tokenizers.
        self._tokenizer: Any = tokenizer
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.fingerprint: str = fingerprint_of(folder)

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """Tokenize a conversation and mark the assistant's turns.

        Raises:
            ValueError: The conversation cannot be rendered; the message gives the reason.
        """
        for message in messages:
            for token in self._tokenizer.all_special_tokens:
                if token in message["content"]:
                    raise ValueError(f"a message contains the control token {token}")
        text = self._render(messages)
        spans = [
            self._span(text, messages, turn)
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        counts = [
            any(start <= first < end for start, end in spans)
            for first, _ in encoding["offset_mapping"]
        ]
        return Conversation(encoding["input_ids"], counts)

    def _span(self, text: str, messages: Sequence[Message], turn: int) -> tuple[int, int]:
        """Return start and end of the assistant's ``turn`` in the rendered ``text``."""
        before = self._render(messages[:turn], add_generation_prompt=True)
        through = self._render(messages[: turn + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template renders turn {turn + 1} differently when more turns follow, so "
                "the assistant's text of that turn cannot be located in the conversation"
            )
        return len(before), len(through)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program and can raise any exception
            raise ValueError(f"the chat template rejects the conversation: {error}") from error


def parse_conversation(line: bytes) -> list[Message]:
    """Parse one JSONL line into messages in OpenAI's format.

    Raises:
        ValueError: The line is not a usable conversation; the message gives the reason.
    """
    try:
        record = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, not {type(record).__name__}")
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise ValueError("has no list 'messages' (OpenAI) or 'conversations' (ShareGPT)")
    messages = [_message(turn) for turn in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message of the assistant, so there is nothing to learn")
    return messages


def write_conversations(
    path: Path, prefix: Path, tokenizer: ChatTokenizer, *, max_malformed: int = 0
) -> list[str]:
    """Write the token file ``prefix`` from the JSONL file ``path``.

    Args:
        path: Input file, one conversation per line.
        prefix: Pair to write, with modes; the report goes to ``prefix.json``.
        tokenizer: Tokenizer with a chat template.
        max_malformed: Maximum number of malformed conversations to skip.

    Returns:
        ``file:line: reason`` for each conversation that was skipped.

    Raises:
        DataError: More than ``max_malformed`` conversations are malformed, or none is usable.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=True)
    malformed: list[str] = []
    written = 0
    for number, line in _lines(path):
        try:
            conversation = tokenizer.encode(parse_conversation(line))
        except ValueError as error:
            malformed.append(f"{path}:{number}: {error}")
            if len(malformed) > max_malformed:
                raise DataError(
                    f"more than {max_malformed} malformed conversations:\n  "
                    + "\n  ".join(malformed)
                ) from error
            continue
        _add(builder, conversation)
        written += 1
    if not written:
        raise DataError(f"{path} contains no conversation")
    builder.finalize(f"{prefix}.idx")
    report = json.dumps({"conversations": written, "malformed": malformed}, indent=2)
    Path(f"{prefix}.json").write_text(report + "\n", encoding="utf-8")
    return malformed


def _add(builder: IndexedDatasetBuilder, conversation: Conversation) -> None:
    marked = zip(conversation.counts, conversation.ids, strict=True)
    for counts, run in groupby(marked, key=lambda pair: pair[0]):
        ids = np.array([token for _, token in run], dtype=np.int64)
        builder.add_item(torch.from_numpy(ids), mode=int(counts))
    builder.end_document()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be an object, not {type(turn).__name__}")
    role = turn.get("role") or _SHAREGPT_ROLES.get(str(turn.get("from")))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise ValueError(f"a turn has an unknown speaker: {turn.get('from')!r}")
    if not isinstance(content, str):
        raise ValueError(f"a turn of the {role} has no text: {content!r}")
    return {"role": role, "content": content}
