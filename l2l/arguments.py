"""Arguments as Python people pass them, as the plain values that a command line gives: checked by the field's annotation.

numpy scalars and arrays, tensors of one number, ``Path``, ``torch.dtype``, ``torch.device``, enumerations, tuples, sets and
subclasses of plain types become what YAML can hold. A configuration derives from :class:`Arguments`, which does so where it is
made; so what is recorded in ``config.yaml`` is plain, and is read back as the same configuration.
"""

import os
import types
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml


def plain(value: Any) -> Any:
    """The value as numbers, text, None, lists and dictionaries, as far as it means these; any other object unchanged."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str):  # of subclasses the value alone
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Set):
        return sorted(map(plain, value), key=lambda inner: (str(type(inner)), inner))
    return [plain(inner) for inner in value] if isinstance(value, list | tuple | range) else value


def fitted(name: str, value: Any, hint: Any) -> Any:
    """The plain value as the annotation wants it: an int as a float, and a number that YAML left as text (1e-5) as a number.

    Raises:
        ValueError: it is of none of the annotation's types; names argument, value and types.
    """
    value = plain(value)
    for lenient in (False, True):
        for kind in _members(hint):
            found = _as(value, kind, lenient)
            if found is not _NOT:
                return found
    raise ValueError(f"{name}={value!r} must be {described(hint)}")


_NOT: Any = object()


def _as(value: Any, kind: Any, lenient: bool) -> Any:
    """The value as one of a union's types, or :data:`_NOT`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value if type(value) is str and value in inner else _NOT
    if kind is float or kind is int:
        if type(value) is kind:
            return value
        if lenient and ((kind is float and type(value) is int) or type(value) is str):
            try:
                return kind(value)
            except ValueError:
                return _NOT
        return _NOT
    if kind in (bool, str, type(None)):
        return value if type(value) is kind else _NOT
    if origin is list:
        if not isinstance(value, list):
            return _NOT
        given = cast(list[Any], value)
        found = [next((f for m in _members(inner[0]) if (f := _as(v, m, lenient)) is not _NOT), _NOT) for v in given]
        return _NOT if any(f is _NOT for f in found) else found
    if origin is dict:
        return cast(Any, value) if isinstance(value, dict) else _NOT
    return _NOT if type(value) in (bool, int, float, str, list) and isinstance(kind, type) else value


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "left out"}


def described(hint: Any) -> str:
    """The types of an annotation in words: ``a number, auto or left out``."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    words: list[str] = []
    for kind in _members(hint):
        if get_origin(kind) is Literal:
            words += map(str, get_args(kind))
        elif get_origin(kind) is list:
            words.append(f"a list, each {described(get_args(kind)[0])}")
        elif get_origin(kind) is dict:
            words.append("a mapping")
        else:
            words.append(_WORDS.get(kind, getattr(kind, "__name__", str(kind))))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@cache
def hints_of(kind: type) -> Mapping[str, Any]:
    """Annotations of a dataclass's fields, resolved."""
    found = get_type_hints(kind)
    return {field.name: found[field.name] for field in fields(kind)}


def plain_scalars(config: Any) -> None:
    """Replace each field of a frozen dataclass that is being made by a plain value, collections apart."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, Collection) or isinstance(value, str):
            object.__setattr__(config, field.name, plain(value))


def fit_fields(config: Any) -> None:
    """Replace each field of a frozen dataclass that is being made by what its annotation wants; errors as of :func:`fitted`."""
    for name, hint in hints_of(type(config)).items():
        object.__setattr__(config, name, fitted(name, getattr(config, name), hint))


def repeated_key(text: str) -> tuple[str, int] | None:
    """The first key that stands twice in one mapping of a YAML or JSON text, and its line from 1; None where none does. A
    reader would silently keep the last value.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    waiting, seen = [yaml.compose(text, yaml.SafeLoader)], set[int]()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:  # an anchor that was met before
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set[tuple[str, str]]()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                    return str(key.value), key.start_mark.line + 1
                keys.add((key.tag, str(key.value)))
    return None


@dataclass(frozen=True)
class Arguments:
    """Base of the configurations of commands: their fields are plain values, whatever they are made from."""

    def __post_init__(self) -> None:
        fit_fields(self)
