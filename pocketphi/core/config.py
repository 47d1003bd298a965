"""Configuration: dataclass defaults, then a recipe file, then `--set a.b=c`. Nothing else.

A configuration is a plain dataclass; `parse` builds one from a mapping, converts and checks every
value, and names the nearest known key when one is misspelt. Units are in the names (`max_tokens`,
`timeout_s`, `cache_bytes`). A class checks its own values in `__post_init__` by raising ConfigError.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pocketphi.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises ConfigError when the file is missing, is not YAML, or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(tree).__name__}")
    return tree


def override(tree: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `tree` with every `a.b=value` applied; values are read as YAML."""
    result = _copy(tree)
    for assignment in assignments:
        key, separator, raw = assignment.partition("=")
        if not separator or not key.strip():
            raise ConfigError(
                f"--set {assignment!r}: expected KEY=VALUE", hint="for example --set train.seed=7"
            )
        try:
            value = yaml.safe_load(raw) if raw.strip() else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment!r}: the value is not valid YAML: {error}") from None
        *parents, leaf = key.strip().split(".")
        node: Any = result
        for part in parents:
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
                continue
            if not isinstance(node, dict):
                raise ConfigError(f"--set {assignment!r}: '{part}' is not inside a mapping")
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
            node[int(leaf)] = value
        elif isinstance(node, dict):
            node[leaf] = value
        else:
            raise ConfigError(f"--set {assignment!r}: '{leaf}' is not inside a mapping")
    return result


def parse(cls: type[T], tree: Mapping[str, Any] | None, *, where: str = "config") -> T:
    """Build the dataclass `cls` from a mapping; absent keys keep their defaults.

    `where` names the place for messages ("recipes/nano.yaml: train").
    Raises ConfigError for an unknown key (with the nearest known one), a missing required key, or a
    value that does not convert to the field's type.
    """
    tree = {} if tree is None else tree
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {type(tree).__name__} {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{key}'{did_you_mean(str(key), fields)}")
    values = {name: _convert(hints[name], tree[name], f"{where}.{name}") for name in fields if name in tree}
    missing = [
        name
        for name, field in fields.items()
        if name not in tree
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: required key '{missing[0]}' is missing")
    try:
        return cls(**values)
    except ConfigError as error:
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from None


def to_tree(config: Any) -> Any:
    """Return `config` as JSON-ready mappings, lists and scalars; the inverse of `parse`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {str(k): to_tree(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_tree(v) for v in config]
    if isinstance(config, Path):
        return str(config)
    return config


def _copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {k: _copy(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_copy(v) for v in node]
    return node


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a YAML value to the annotated type, or raise ConfigError naming the place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        problems = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                problems.append(error)
        # A mapping was surely meant for the dataclass among the options: show its own complaint.
        raise problems[-1] if isinstance(value, Mapping) else problems[0]
    if origin is typing.Literal:
        if value in args:
            return value
        near = did_you_mean(str(value), map(str, args))
        raise ConfigError(f"{where}: {value!r} is not one of the choices{near}")
    if dataclasses.is_dataclass(kind):
        return parse(kind, value, where=where)  # type: ignore[arg-type]
    if origin in (list, tuple) or kind in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        item = args[0] if args else Any
        items = [_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if (origin or kind) is tuple else items
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {value!r}")
        item = args[1] if args else Any
        return {str(k): _convert(item, v, f"{where}.{k}") for k, v in value.items()}
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
            return int(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e6 as a string
            try:
                if float(value) == int(float(value)):
                    return int(float(value))
            except (ValueError, OverflowError):
                pass
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind is str:
        if isinstance(value, str):
            return value
    elif kind is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    else:
        raise TypeError(f"{where}: configuration fields of type {kind} are not supported")
    raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}")
