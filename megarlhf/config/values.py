"""From texts to values by a field's type: one way for flags and YAML, for our options and those passed on."""

import json
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import yaml

from megarlhf.config.installed_fields import Settings, Unwritable, shown


def alternatives(kind: Any) -> list[Any]:
    """The members of a union, nested ones too."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [part for member in get_args(kind) for part in alternatives(member)]
    return [kind]


def as_text(value: Any) -> str:
    """A value of a YAML file as it would stand on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def value_of(texts: Sequence[str], kind: Any) -> Any:
    """The value that texts, such as those after a flag, give to a field of this type; lists for all kinds of sequences.

    Raises:
        ValueError: they are of another type.
    """
    members = alternatives(kind)
    for member in sorted(members, key=lambda member: member is str):  # text takes whatever is left
        try:
            return _converted(texts, member)
        except (LookupError, ValueError, yaml.YAMLError):
            continue
    if set(members) <= {Unwritable, types.NoneType}:
        raise ValueError("takes an object, which no text can give")
    raise ValueError(f"takes {shown(kind)}, not {' '.join(texts)!r}" if texts else f"takes {shown(kind)}, not no value")


def _converted(texts: Sequence[str], kind: Any) -> Any:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (list, set, tuple):
        return _items(texts, origin, parts)
    (text,) = texts
    if origin is Literal:
        return {str(choice): choice for choice in parts}[text]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is types.NoneType:
        return {"none": None, "null": None}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    value = yaml.safe_load(text)
    if kind is not Any and not (origin in (dict, Settings) and isinstance(value, dict)):
        raise ValueError
    return value


def _items(texts: Sequence[str], origin: type, parts: tuple[Any, ...]) -> list[Any]:
    """Values of a sequence from a text each, or from one text that is a YAML list."""
    if len(texts) == 1 and texts[0].startswith("["):
        texts = [as_text(item) for item in yaml.safe_load(texts[0])]
    elif len(texts) == 1 and parts[0] in (int, float, bool):
        texts = texts[0].split(",")
    elif not texts and Ellipsis not in parts:
        raise ValueError
    kinds = parts if origin is tuple and Ellipsis not in parts else (*parts, Any)[:1] * len(texts)
    return [value_of([text], kind) for text, kind in zip(texts, kinds, strict=True)]
