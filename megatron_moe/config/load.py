"""Load YAML and command-line overrides into one frozen ``RunConfig``.

A configuration is one YAML file plus ``key.path=value`` arguments, nothing else: no environment
variables, no inheritance between files. Unknown keys and wrong types are reported together.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_moe.config.synonyms import SETTING_OF
from megatron_moe.errors import ConfigError
from megatron_moe.regular_file import regular_or_shell_pipe

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader without the surprises of YAML 1.1.

    ``3e-4`` is a number, ``2024-01-01`` and ``12:30`` are text, ``010`` is not 8, a name stays as
    written (``no``, ``on`` and ``1`` too), and a name that stands twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping, with names as written.

        Raises:
            ConfigError: A name stands twice.
        """
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            key.tag = "tag:yaml.org,2002:str"
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"{key.value} stands twice, in line {lines[key.value]} and in line {line}: one "
                    "of them would be ignored.\n  remove one of the lines"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _resolve_implicitly(kind: str, pattern: str, first: str) -> None:
    tag = f"tag:yaml.org,2002:{kind}"
    for character, resolvers in _Loader.yaml_implicit_resolvers.items():
        _Loader.yaml_implicit_resolvers[character] = [r for r in resolvers if r[0] != tag]
    _Loader.add_implicit_resolver(tag, re.compile(pattern), list(first))


_Loader.yaml_implicit_resolvers = {
    character: [r for r in resolvers if r[0] != "tag:yaml.org,2002:timestamp"]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_resolve_implicitly("int", r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$", "-+0123456789")
_resolve_implicitly(
    "float",
    r"^([-+]?(\d[\d_]*\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN))$",
    "-+0123456789.",
)


MOST_VALUES = 100_000
"""Values that a configuration may have; a mixture of a thousand domains has a few thousand."""
RENAMED = {"dense": "source"}
"""Sections that had another name in version 0.1, and their names now. A file that a user wrote is
refused with the new name; a file of a checkpoint is read as it is."""


def _unchanged(tree: dict[str, Any]) -> dict[str, Any]:
    return tree


def load(
    cls: type[Model],
    path: Path,
    overrides: Iterable[str] = (),
    *,
    from_checkpoint: bool = False,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged,
) -> Model:
    """Read ``path`` into an instance of ``cls``, the root section.

    Args:
        cls: The root configuration class, ``RunConfig`` everywhere outside tests.
        path: A YAML file.
        overrides: ``parallel.expert_parallel_size=4`` style arguments, applied in order.
        from_checkpoint: Whether an older version may have written the file; renamed sections are
            then read under their old names too.
        complete: Function that adds settings which follow from others, before validation.

    Raises:
        ConfigError: No such file, broken YAML, or any number of unknown keys, missing keys and
            values of a wrong type, listed together.
    """
    try:
        text = regular_or_shell_pipe(path).read_text(encoding="utf-8")
        tree: Any = yaml.load(text, _Loader) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or thousands of digits
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not a configuration: it is nested too deeply") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (run:, source:, ...), not {tree!r:.100}")
    if _count(tree, MOST_VALUES) > MOST_VALUES:
        raise ConfigError(
            f"{path} has more than {MOST_VALUES:,} values, aliases (*name) included.\n"
            "  write values out instead of repeating them by aliases"
        )
    if from_checkpoint:
        tree = {RENAMED.get(name, name): section for name, section in tree.items()}
    tree = _without_empty_sections(cls, tree)
    for override in overrides:
        _apply(tree, override)
    return build(cls, complete(tree))


def overridden(config: Model, overrides: Iterable[str]) -> Model:
    """Return the configuration with ``key.path=value`` arguments applied; see `load` for errors."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        _apply(tree, override)
    return build(type(config), tree)


def _count(value: Any, most: int) -> int:
    """Return the number of values in a tree, or one more than ``most`` if there are more.

    A few lines of YAML can name a list that names a list ten times, and so on: gigabytes as JSON.
    """
    if most < 0 or not isinstance(value, (dict, list)):
        return 1
    count = 1
    for child in value.values() if isinstance(value, dict) else value:
        count += _count(child, most - count)
        if count > most:
            return most + 1
    return count


def build(cls: type[Model], tree: dict[str, Any]) -> Model:
    """Validate a tree of plain values; see `load` for what it raises."""
    try:
        # In JSON mode, strict validation accepts text for a path but not "1" for 1.
        return cls.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, e) for e in error.errors())) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the configuration holds a value that JSON cannot express: {error}"
        ) from error


def dump(config: BaseModel) -> str:
    """Return the resolved configuration as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a dumped configuration under dotted names.

    >>> dict(leaves({"optimizer": {"lr": 0.1}, "train": {"freeze": []}}))
    {'optimizer.lr': 0.1, 'train.freeze': []}
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without_empty_sections(cls: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Drop sections without a line, such as ``parallel:`` with all lines commented out."""
    result = {}
    for name, value in tree.items():
        field = cls.model_fields.get(name)
        kind = field.annotation if field is not None else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if value is None:
                continue
            value = _without_empty_sections(kind, value) if isinstance(value, dict) else value
        result[name] = value
    return result


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from error


def _explain(root: type[BaseModel], error: ErrorDetails) -> str:
    """Describe one violation: setting, value, rule, way out."""
    parts = [str(part) for part in error["loc"]]
    name = ".".join(p for p in parts if not p.startswith(("literal[", "list[", "constrained-")))
    match error["type"]:
        case "extra_forbidden":
            fields = _section(root, parts[:-1]).model_fields
            if name in RENAMED:
                return f"{name} is not a section; it is called {RENAMED[name]} now"
            return f"{name} is not a setting; {_meant(parts, list(fields))}"
        case "missing":
            return f"{name} must be set"
        case "literal_error":
            allowed = error.get("ctx", {}).get("expected", "")
            if parts[-1] == "[key]":
                setting = name.removesuffix(f".{parts[-2]}.[key]")
                return f"{setting} has the name {error['input']!r}, must be one of {allowed}"
            return f"{name} is {_shown(error['input'])}, must be one of {allowed}"
        case _:
            rule = error["msg"].removeprefix("Input should be ")
            rule = _KINDS.get(error["type"], rule)
            if error["type"] == "string_type" and _is_path(root, parts):
                rule = "a path"
            return f"{name} is {_shown(error['input'])}, must be {rule}"


_KINDS = {
    "string_type": "text", "int_type": "an integer", "int_from_float": "an integer",
    "float_type": "a number", "bool_type": "true or false", "list_type": "a list",
    "dict_type": "a mapping of names to values", "model_type": "a section of settings",
}  # fmt: skip
"""Kinds of values in the words of YAML, by pydantic's type of error."""


def _shown(value: Any) -> str:
    """Return a value as it is written in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _is_path(root: type[BaseModel], parts: list[str]) -> bool:
    field = _section(root, parts[:-1]).model_fields.get(parts[-1])
    return field is not None and _allows_path(field.annotation)


def _allows_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_allows_path, get_args(annotation)))


def _meant(parts: list[str], fields: list[str]) -> str:
    """Return a hint for a name that is not a setting: what it is called here, or what is."""
    if setting := SETTING_OF.get(parts[-1].lower().replace("-", "_")):
        return f"did you mean {setting}?"
    if close := difflib.get_close_matches(parts[-1], fields, n=1):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(fields)}"


def _section(root: type[BaseModel], parts: list[str]) -> type[BaseModel]:
    """Return the section at ``parts``; names of a mapping's entries are skipped."""
    section = root
    for part in parts:
        if part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of a field, itself or as values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
