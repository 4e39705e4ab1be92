"""Parts of a model that settings name: roles, all of them or in some layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, cast, get_args

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

Role = Literal[
    "router", "experts", "shared_experts", "dense_ffn", "attention", "norms", "embeddings",
    "adapters",
]  # fmt: skip
"""Part of the model that settings name: every parameter has one role."""
ROLE_NAMES: tuple[Role, ...] = get_args(Role)
_PATTERN = rf"({'|'.join(ROLE_NAMES)})(?:@(\d{{1,4}})(?:-(\d{{1,4}}))?)?"


class Part(NamedTuple):
    """Parameters of one role in one layer, or outside of the layers."""

    role: Role
    layer: int | None

    def label(self, *, by_layer: bool) -> str:
        """Return the name under which the updates of these parameters are counted."""
        if not by_layer:
            return self.role
        return f"{self.role}@{'none' if self.layer is None else self.layer}"


def layers_of_name(name: str) -> tuple[Role, range | None]:
    """Split the name of a part into its role and layers; None: all layers, and outside of them.

    >>> layers_of_name("attention@0-3"), layers_of_name("norms")
    (('attention', range(0, 4)), ('norms', None))

    Raises:
        ValueError: ``name`` is not the name of a part.
    """
    parsed = re.fullmatch(_PATTERN, name, re.ASCII)
    if parsed is None:
        raise ValueError(f"{name} names no part of a model")
    role, first, last = parsed.groups()
    if first is None:
        return cast("Role", role), None
    layers = range(int(first), int(last or first) + 1)
    if not layers:
        raise ValueError(f"{name} has no layers")
    return cast("Role", role), layers


def _checked(name: str) -> str:
    try:
        layers_of_name(name)
    except ValueError as error:
        roles = ", ".join(map(repr, ROLE_NAMES))
        expected = f"{roles}, or one with layers such as 'attention@0-3'"
        raise PydanticCustomError("literal_error", "{expected}", {"expected": expected}) from error
    return name


PartName = Annotated[
    str,
    AfterValidator(_checked),
    WithJsonSchema({"type": "string", "pattern": f"^{_PATTERN}$"}),
]
"""A role, or a role in a layer or in a range of layers: attention, attention@3, attention@0-3."""


def factor_of(factors: Mapping[str, float], part: Part) -> float:
    """Return the factor of a part in a mapping of names to factors; 1 if none names it."""
    for name, factor in factors.items():
        role, layers = layers_of_name(name)
        if role == part.role and (layers is None or part.layer in layers):
            return factor
    return 1.0


@dataclass(frozen=True, slots=True)
class Frozen:
    """Parts of a model that are not trained."""

    roles: frozenset[Role] = frozenset()
    """Roles that are frozen everywhere."""
    layers: frozenset[Part] = frozenset()
    """Roles that are frozen in single layers."""

    @classmethod
    def named(cls, names: Iterable[str]) -> Frozen:
        """Return the parts with these names in settings."""
        split = [layers_of_name(name) for name in names]
        roles: frozenset[Role] = frozenset(role for role, layers in split if layers is None)
        single = {Part(role, layer) for role, layers in split for layer in layers or ()}
        return cls(roles, frozenset(part for part in single if part.role not in roles))

    def __contains__(self, role: Role) -> bool:
        """Return whether the role is frozen everywhere."""
        return role in self.roles

    def __bool__(self) -> bool:
        return bool(self.roles or self.layers)

    def __and__(self, other: Frozen) -> Frozen:
        single = {part for part in self.layers if other.covers(part)}
        single |= {part for part in other.layers if self.covers(part)}
        return Frozen(self.roles & other.roles, frozenset(single))

    def with_roles(self, roles: frozenset[Role]) -> Frozen:
        """Return these parts and all of the roles."""
        others = frozenset(part for part in self.layers if part.role not in roles)
        return Frozen(self.roles | roles, others)

    def covers(self, part: Part) -> bool:
        """Return whether these parameters are frozen."""
        return part.role in self.roles or part in self.layers

    def trained(self, role: Role, layers: Collection[int]) -> int:
        """Return the number of ``layers`` in which the role is trained."""
        if role in self.roles:
            return 0
        if not self.layers:
            return len(layers)
        return len(layers) - sum(Part(role, layer) in self.layers for layer in layers)

    def names(self) -> list[str]:
        """Return names of the parts in the order of roles, with as long ranges as possible."""
        names: list[str] = []
        for role in ROLE_NAMES:
            if role in self.roles:
                names.append(role)
            layers = sorted(part.layer for part in self.layers if part.role == role and
                            part.layer is not None)  # fmt: skip
            for first in (n for n in layers if n - 1 not in layers):
                last = first
                while last + 1 in layers:
                    last += 1
                names.append(f"{role}@{first}-{last}" if last > first else f"{role}@{first}")
        return names


def updates_of(updates: Mapping[str, int], label: str) -> int | None:
    """Return the updates of a part in a checkpoint; None if it was frozen.

    Args:
        updates: Updates by label, of roles or of roles by layer.
        label: Label of the part; by layer if the updates are.
    """
    by_layer = counts_layers(updates)
    return updates.get(label if by_layer else label.partition("@")[0])


def counts_layers(names: Iterable[str]) -> bool:
    """Return whether names or labels distinguish layers."""
    return any("@" in name for name in names)


ALL_TRAINED = Frozen()
"""No part is frozen."""
