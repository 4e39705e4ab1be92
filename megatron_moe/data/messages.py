"""Parse one line of a conversation file into messages that a chat template reads.

Supported are OpenAI's ``{"messages": [{"role": ..., "content": ...}], "tools": [...]}`` and
ShareGPT's ``{"conversations": [{"from": ..., "value": ...}]}``. Further keys of a message
(``tool_calls``, ``name``, ``reasoning_content``) are handed to the template unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.json_text import parse_json

Message = Mapping[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SHAREGPT_KEYS = ("from", "value")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation, as text."""

    messages: list[Message]

    tools: list[Any] = field(default_factory=list)
    """Descriptions of the tools that the assistant may call."""


def parse_dialogue(line: bytes) -> Dialogue:
    """Parse one JSONL line.

    Raises:
        ValueError: The line is not a usable conversation; the message gives the reason.
    """
    try:
        record = parse_json(line)
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
    tools = record.get("tools") or []
    if isinstance(tools, str):  # a Parquet file turned into JSON often holds JSON in a string
        tools = parse_json(tools)
    dialogue = Dialogue(messages, tools if isinstance(tools, list) else [])
    for text in strings([dialogue.messages, dialogue.tools]):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
            raise ValueError(f"not Unicode text: {error.reason}") from error
    return dialogue


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a parsed JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def called_names(message: Message) -> list[str]:
    """Return the names of the tools that a message calls."""
    calls = message.get("tool_calls") or []
    return [str(call["function"]["name"]) for call in calls]


def _message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be an object, not {type(turn).__name__}")
    role = turn.get("role") or _SHAREGPT_ROLES.get(str(turn.get("from")))
    if not isinstance(role, str):
        raise ValueError(f"a turn has an unknown speaker: {turn.get('from')!r}")
    others = {k: v for k, v in turn.items() if k not in _SHAREGPT_KEYS and v is not None}
    if calls := turn.get("tool_calls"):
        others["tool_calls"] = [_call(call) for call in calls]
    content = turn.get("content", turn.get("value"))
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, role) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"a turn of the {role} has no text: {content!r}")
    return {**others, "role": role, "content": content}


def _part(part: object, role: str) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise ValueError(f"a turn of the {role} has a part that is not text: {kind}")
    return text


def _call(call: object) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, as templates expect; OpenAI sends text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"a tool call has no function with a name: {call!r}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise ValueError(f"the arguments of a tool call are not JSON: {arguments!r}") from error
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
