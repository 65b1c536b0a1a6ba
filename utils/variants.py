"""Sections whose `kind` decides which keys they have.

Such a section is a dataclass with a field `kind` and a class method `variants`, a mapping of kinds to dataclasses
derived from it. It may have a static method `switched(values, kind)`: what lower layers said of another kind, in the
keys of `kind`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from utils.errors import ConfigError
from utils.fields import field_types, section_type


def has_variants(section: type) -> bool:
    return hasattr(section, "variants")


def kind_in(section: Any, values: Mapping[Any, Any]) -> Any:
    """The kind that a section's values name, or its default."""
    return values.get("kind", next(field.default for field in dataclasses.fields(section) if field.name == "kind"))


def variant_in(section: Any, values: Mapping[Any, Any]) -> type | None:
    """The variant that a section's values name, None if there is none of this kind."""
    kind = kind_in(section, values)
    return section.variants().get(kind) if isinstance(kind, str) else None


def merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Mappings merge, everything else is replaced."""
    both = {key: merged(below[key], above[key]) for key in above if _are_mappings(below.get(key), above[key])}
    return {**below, **above, **both}


def laid(schema: type, below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """What an upper layer says of a `schema`, laid over what the lower ones said: as `merged`, but for kinds.

    Where the upper layer changes a section's kind, keys of the lower ones that only the other kind has are dropped.
    """
    hints, both = field_types(schema), {}
    for key, value in above.items():
        stands = below.get(key)
        if isinstance(stands, str) and "${" in stands and isinstance(value, Mapping):
            raise ConfigError(
                f"{key}: {stands} stands for a whole section, and a later layer sets {', '.join(map(str, value))} in "
                "it: write the section out"
            )
        if _are_mappings(below.get(key), value):
            section = section_type(hints.get(key))
            both[key] = merged(below[key], value) if section is None else _laid_section(section, below[key], value)
    return {**below, **above, **both}


def _laid_section(section: Any, below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    if not has_variants(section):
        return laid(section, below, above)
    old, new = variant_in(section, below), variant_in(section, {**below, **above})
    if new is None:  # which is refused when the values are read
        return merged(below, above)
    if old not in (None, new):
        if hasattr(section, "switched"):
            below = section.switched(below, kind_in(section, above))
        below = _without_keys_of(old, new, below)
    return laid(new, below, above)


def _without_keys_of(old: Any, new: type, values: Mapping[Any, Any]) -> dict[Any, Any]:
    only_old = field_types(old).keys() - field_types(new).keys()
    return {key: value for key, value in values.items() if key not in only_old}


def without_other_kinds(schema: type, values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`values` of a `schema` without the keys that sections have in other kinds alone."""
    hints, kept = field_types(schema), dict(values)
    for key, value in values.items():
        section: Any = section_type(hints.get(key))
        if section is None or not isinstance(value, Mapping):
            continue
        if has_variants(section) and (chosen := variant_in(section, value)) is not None:
            for other in section.variants().values():
                value = _without_keys_of(other, chosen, value)
            section = chosen
        kept[key] = without_other_kinds(section, value)
    return kept


def without_absent(schema: type, below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """An overlay's values without its optional sections, at any depth, that the values of a `schema` below it lack."""
    hints, kept = field_types(schema), dict(above)
    defaults = {field.name: field.default for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key, value in above.items():
        section: Any = section_type(hints.get(key))
        if section is None or not isinstance(value, Mapping):
            continue
        stands = below.get(key, defaults[key])
        if stands is None:
            del kept[key]
            continue
        stands = stands if isinstance(stands, Mapping) else {}
        if has_variants(section):
            section = variant_in(section, {**stands, **value}) or section
        kept[key] = without_absent(section, stands, value)
    return kept


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


# ------------------------------------------------------------------------------------------------ made in Python


def check_kind(config: Any) -> None:
    """Raises ValueError, one line, for a section whose kind is none, or whose class is not that of its kind."""
    kinds, kind = config.variants(), config.kind
    if kind not in kinds:
        raise ValueError(f"kind '{kind}' is unknown: choose {', '.join(kinds)}")
    if type(config) is not kinds[kind]:
        name, right = type(config).__name__, kinds[kind].__name__
        raise ValueError(f"{'an' if name[0] in 'AEIO' else 'a'} {name} is no config of kind {kind}: choose {right}")


def refuse_unbounded(value: Any, where: str) -> None:
    """Raises ValueError for NaN and infinity, alone or in lists and tables."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            refuse_unbounded(item, f"{where}[{number}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_unbounded(item, f"{where}.{key}")
    elif dataclasses.is_dataclass(value) and where.endswith("]"):  # a section in a list
        check_kinds(value, where)


def check_kinds(config: Any, path: str = "") -> None:
    """Raises ValueError, one line, for a section of `config`, at any depth, that `check_kind` refuses, and for a number
    that is not finite."""
    for field in dataclasses.fields(config):
        section, where = getattr(config, field.name), f"{path}.{field.name}".lstrip(".")
        refuse_unbounded(section, where)
        if not dataclasses.is_dataclass(section):
            continue
        if has_variants(type(section)):
            try:
                check_kind(section)
            except ValueError as problem:
                raise ValueError(f"{where}: {problem}") from None
        check_kinds(section, where)
