"""Refuse a job whose machines were started with different settings."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.config.load import leaves
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError

if TYPE_CHECKING:  # imports torch, which --help does not wait for
    from megatron_moe.runtime.world import World


def check_same_settings(config: RunConfig, world: World) -> None:
    """Compare the settings of all ranks; all ranks must call it.

    A rank with another learning rate would train other weights, and with another batch size it
    would wait forever. Paths may differ, because machines may mount the same folder elsewhere.

    Raises:
        ConfigError: A rank differs from rank 0; the message names both, and the settings.
    """
    from megatron_moe.hf.checksums import checksum
    from megatron_moe.runtime.together import gathered

    settings = {name: _shown(value) for name, value in leaves(config.model_dump())}
    text = json.dumps(settings, sort_keys=True)
    if len(set(gathered(checksum(text.encode())))) == 1:
        return
    held = [json.loads(one) for one in gathered(json.dumps([socket.gethostname(), text]))]
    first = json.loads(held[0][1])
    rank = next(rank for rank, (_, other) in enumerate(held) if other != held[0][1])
    other = json.loads(held[rank][1])
    named = ", ".join(
        f"{name} ({first.get(name)} and {other.get(name)})"
        for name in sorted(first | other)
        if first.get(name) != other.get(name)
    )
    raise ConfigError(
        f"all ranks must have the same settings, but rank 0 on {held[0][0]} and rank {rank} on "
        f"{held[rank][0]} have different ones: {named}.\n"
        "  run the same command with the same file on all machines"
    )


def _shown(value: Any) -> str:
    """Return the text of a value, in which all paths are alike."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "a path" if isinstance(value, Path) else str(value)
