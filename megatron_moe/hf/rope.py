"""Read the rotary settings of a ``config.json``, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RopeType = Literal["llama3", "linear", "dynamic", "yarn"]

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
}
"""Supported values of rope_type, and the numbers that each needs."""
ROPE_TYPES = tuple(_NEEDED)
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies."""

    rope_type: RopeType = "llama3"
    factor: float
    original_max_position_embeddings: int
    """Context length before scaling; with ``dynamic`` the length up to which nothing is scaled."""
    low_freq_factor: float = 1.0
    """Only with ``llama3``, like the next."""
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    """Only with ``yarn``, like the next ones."""
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Factor of query and of key after rotation."""


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the rotary settings as transformers 5 does.

    Version 5 writes ``rope_parameters``; version 4 wrote ``rope_theta`` and ``rope_scaling``. If
    both are present, ``rope_scaling`` takes precedence. ``original_max_position_embeddings`` may be
    a key of ``config`` itself, which then counts.
    """
    defaults = {"rope_theta": config.get("rope_theta", 10000.0)}
    if "partial_rotary_factor" in config:
        defaults["partial_rotary_factor"] = config["partial_rotary_factor"]
    rope = {**defaults, **(config.get("rope_scaling") or config.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope["rope_type"] in ("llama3", "yarn"):
        length = config.get("original_max_position_embeddings")
        if length is not None:
            rope["original_max_position_embeddings"] = length
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


def unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    """Return reasons for rotary settings that this package does not support."""
    rope = rope_parameters(config)
    reasons = []
    if rope["rope_type"] not in _NEEDED:
        reasons.append(
            f"rope_type is {rope['rope_type']!r}: supported are {', '.join(_NEEDED)}, whose "
            "frequencies do not depend on the text"
        )
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        reasons.append(f"rope_parameters differ by layer type ({', '.join(nested)}): not supported")
    if (part := rope.get("partial_rotary_factor")) not in (None, 1):
        reasons.append(f"partial_rotary_factor is {part}: must be 1, heads are rotated as a whole")
    return reasons


def rope_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of the rotary settings that must be positive, by their name in errors."""
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    needed = _NEEDED.get(kind, ())
    numbers = {f"{key} of rope_type {kind}": rope.get(key) for key in needed}
    present = [key for key in _OPTIONAL if kind == "yarn" and rope.get(key) is not None]
    if kind in ("llama3", "yarn"):
        present.append("original_max_position_embeddings")
    numbers |= {f"{key} of rope_type {kind}": rope[key] for key in present}
    return {"rope_theta": rope["rope_theta"], **numbers}


def rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """Return the scaling of a configuration whose numbers have been checked; None without one."""
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind == "default":
        return None
    length = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    if kind == "dynamic":  # transformers scales it beyond this length, whatever else is written
        length = config["max_position_embeddings"]
    common: dict[str, Any] = {
        "rope_type": kind,
        "factor": float(rope["factor"]),
        "original_max_position_embeddings": int(length),
    }
    if kind == "llama3":
        common |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        common |= {
            "beta_fast": float(rope.get("beta_fast") or 32),
            "beta_slow": float(rope.get("beta_slow") or 1),
            "truncate": bool(rope.get("truncate", True)),
            "attention_factor": _attention_factor(rope),
        }
    return RopeScaling(**common)


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """Return YaRN's factor, computed from ``factor`` unless it is given (arXiv 2309.00071)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def growth(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return growth(1.0)
