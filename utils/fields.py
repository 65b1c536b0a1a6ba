"""What the fields of a dataclass may hold, as types and in words."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

E = TypeVar("E", bound=Enum)

SHOWN = 60  # characters of an offending value that are worth showing in an error
WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}


@functools.cache
def field_types(schema: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def options_of(hint: Any) -> tuple[Any, ...]:
    """Members of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def section_type(hint: Any) -> type | None:
    """The dataclass of a nested section, when ``hint`` is one (or an optional one)."""
    return next((o for o in options_of(hint) if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def describe(hint: Any) -> str:
    """What is allowed, in words: ``a number or null``."""
    return " or ".join(_describe_one(option) for option in options_of(hint))


def _describe_one(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(map(describe, args))})"
    if origin in (list, tuple):
        return f"a list, each item {describe(args[0])}"
    if origin is dict:
        return f"key: value lines, each value {describe(args[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a section with keys {short_list(list(field_types(hint)))}"
    return WORDS.get(hint, str(hint))


def hint_at(schema: type, path: str) -> Any:
    """The type of the key at a path."""
    hint: Any = schema
    for key in path.split("."):
        owner = section_type(hint)
        if owner is None or key not in field_types(owner):
            return hint
        hint = field_types(owner)[key]
    return hint


def suggest(key: str, schema: type, path: str, root: type) -> str:
    """What may have been meant by a key that the section at `path` lacks."""
    legal = list(field_types(schema))
    near = difflib.get_close_matches(key, legal, n=1)
    if near:
        return f"did you mean {path + '.' + near[0] if path else near[0]!r}?"
    elsewhere = list(dict.fromkeys(other for other in _key_paths(root) if other.split(".")[-1] == key))
    if elsewhere:
        return f"did you mean {short_list(elsewhere, 3)}?"
    return f"allowed in {path or 'the top level'}: {short_list(legal, 40)}"


def _key_paths(schema: type, prefix: str = "") -> Iterator[str]:
    for key, hint in field_types(schema).items():
        yield prefix + key
        section = section_type(hint)
        if section is not None and section is not schema:
            for variant in [*section.variants().values()] if hasattr(section, "variants") else [section]:
                yield from _key_paths(variant, f"{prefix}{key}.")


def short_list(names: Sequence[str], most: int = 12) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def show(value: Any) -> str:
    """A value as an error shows it, not too long."""
    if isinstance(value, int) and value.bit_length() > 999:  # Python refuses to write those of 4,300 digits
        return f"a number of {value.bit_length()} bits"
    text = str(value) if isinstance(value, Enum) else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def check_modes(config: object) -> None:
    """For `__post_init__`: makes the texts of fields that hold an enum its members, as the loader has done already.

    Raises ValueError in one line for a text that is none of them.
    """
    schema: type = type(config)
    for name, hint in field_types(schema).items():
        options, value = options_of(hint), getattr(config, name)
        enum = next((option for option in options if isinstance(option, type) and issubclass(option, Enum)), None)
        if enum is not None and not (value is None and type(None) in options):
            setattr(config, name, member_of(enum, value, name, nullable=type(None) in options))


def member_of(enum: type[E], value: object, name: str, *, nullable: bool = False) -> E:
    """The member of this value. Raises ValueError in one line, which calls the value `name`, where there is none."""
    for member in enum:
        if value is member or value == member.value:
            return member
    values = [str(member.value) for member in enum]
    choices = (" or " if len(values) == 2 else ", ").join(values) + (", or null" if nullable else "")
    raise ValueError(f"{name} '{value}' is unknown: choose {choices}")
