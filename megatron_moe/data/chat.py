"""Conversations to ids in the model's own chat format, with the assistant's words marked.

Read are OpenAI's ``{"messages": [{"role": ..., "content": ...}]}`` and ShareGPT's
``{"conversations": [{"from": ..., "value": ...}]}``, one a line. The loss counts on what the
assistant says and on the token that ends its turn (LLaMA-MoE, arXiv 2406.16554, section 3.4, trains
on the responses of ShareGPT conversations), which the marks say.

On disk a conversation is one document of Megatron's multimodal token file: a sequence for each run
of tokens of one kind, whose mode is 1 where the loss counts.
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
    """One conversation as the model sees it."""

    ids: list[int]

    counts: list[bool]
    """Whether the model is to learn to say each id."""


class ChatTokenizer:
    """The chat template of a dense folder."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer and its template, offline and without running code of the folder.

        Raises:
            DataError: No fast tokenizer there, or one without a chat template.
        """
        from transformers import AutoTokenizer  # which takes a second: training needs none

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise bare Exception for bad files
            raise DataError(f"cannot read the tokenizer of {folder}: {error}") from error
        if not tokenizer.is_fast or not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {folder} has no chat template, or no tokenizer.json.\n"
                "  put the chat_template.jinja that the tuned model shall speak into the folder"
            )
        # Any: the stub knows no fast tokenizer.
        self._tokenizer: Any = tokenizer
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.fingerprint: str = fingerprint_of(folder)

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """Ids of the conversation, with the assistant's turns marked.

        Raises:
            ValueError: Why it cannot be rendered, in words for the user.
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
        """Characters of the rendered ``text`` that the assistant says in ``turn``."""
        before = self._render(messages[:turn], add_generation_prompt=True)
        through = self._render(messages[: turn + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template renders turn {turn + 1} otherwise when more turns follow, so "
                "what the assistant says there has no place in the whole"
            )
        return len(before), len(through)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # the template is a program, and raises what it likes
            raise ValueError(f"the chat template refuses the conversation: {error}") from error


def parse_conversation(line: bytes) -> list[Message]:
    """The messages of one JSONL line, in OpenAI's form.

    Raises:
        ValueError: Why the line is no conversation to learn from, in words for the user.
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
        raise ValueError("the assistant says nothing, so there is nothing to learn")
    return messages


def write_conversations(
    path: Path, prefix: Path, tokenizer: ChatTokenizer, *, max_malformed: int = 0
) -> list[str]:
    """Write the token file ``prefix`` from the JSONL file ``path``.

    Args:
        path: One conversation a line.
        prefix: The pair to write, with modes; ``prefix.json`` gets the report.
        tokenizer: The chat template.
        max_malformed: Conversations that may be left out because they are broken.

    Returns:
        ``file:line: reason`` of each conversation that was left out.

    Raises:
        DataError: More broken conversations than that, or none that is whole.
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
                    f"more than {max_malformed} broken conversations:\n  " + "\n  ".join(malformed)
                ) from error
            continue
        _add(builder, conversation)
        written += 1
    if not written:
        raise DataError(f"{path} holds no conversation")
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
        raise ValueError(f"a turn is of no known speaker: {turn.get('from')!r}")
    if not isinstance(content, str):
        raise ValueError(f"a turn of the {role} has no text: {content!r}")
    return {"role": role, "content": content}
