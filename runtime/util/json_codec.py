"""Frozen dataclasses to JSON and back, strictly.

An unknown key, a missing key or a value of another type is an error that names the path inside the
document, so that a damaged or foreign file is refused where it differs and never half-understood.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from llava_edge.profiles.errors import ArtifactError

T = TypeVar("T")

KEY = "json_key"
"""In a field's metadata: its key in JSON, where that is not its name."""


def to_json(value: Any) -> Any:
    """Plain JSON values of a dataclass tree; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key(f): to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], value: Any, where: str = "$") -> T:
    """Build ``cls`` from parsed JSON.

    Raises:
        ArtifactError: a key is unknown or missing, or a value has another type; names the path.
    """
    return typing.cast(T, _read(cls, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(kind):
            return None
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return _read(options[0], value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            allowed = ", ".join(map(repr, typing.get_args(kind)))
            raise ArtifactError(f"{where} is {value!r}; allowed are {allowed}")
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        return _read_tuple(typing.get_args(kind), value, where)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        (_, item_kind) = typing.get_args(kind)
        return {key: _read(item_kind, item, f"{where}.{key}") for key, item in value.items()}
    return _read_scalar(kind, value, where)


def _read_dataclass(kind: type[Any], value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    hints = typing.get_type_hints(kind)
    fields = {_key(f): f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise ArtifactError(f"{where} has unknown keys: {', '.join(unknown)}")
    optional = {
        name
        for name, f in fields.items()
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    }
    if missing := sorted(set(fields) - set(value) - optional):
        raise ArtifactError(f"{where} lacks keys: {', '.join(missing)}")
    names = {key: f.name for key, f in fields.items()}
    return kind(
        **{
            names[key]: _read(hints[names[key]], item, f"{where}.{key}")
            for key, item in value.items()
        }
    )


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get(KEY, field.name))


def _read_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    _expect(len(value) == len(args), f"a list of {len(args)}", value, where)
    pairs = zip(args, value, strict=True)
    return tuple(_read(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(pairs))


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int; True is not a count.
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    _expect(fits, kind.__name__, value, where)
    return value


def _expect(holds: bool, what: str, value: Any, where: str) -> None:
    if not holds:
        raise ArtifactError(f"{where} must be {what}, found {type(value).__name__} {value!r:.60}")
