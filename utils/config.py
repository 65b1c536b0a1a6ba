"""Typed configuration: YAML + ``key=value`` overrides -> instance of a dataclass, by OmegaConf structured configs.

Knows nothing of the project's schema. Whatever a user can get wrong ends in a ``ConfigError`` of one line which names
the key's full path, the offending value and the remedy.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from utils.absent import absent
from utils.errors import ConfigError
from utils.fields import describe, field_types, hint_at, options_of, section_type, show, suggest
from utils.reading import reading
from utils.references import check_references, literal, refuse_calls
from utils.variants import has_variants, kind_in, laid, merged, without_absent, without_other_kinds
from utils.writing import write_text
from utils.yaml_files import DEPTH, LITERAL, check_yaml, read_yaml

T = TypeVar("T")

YAML = (".yaml", ".yml")
BASES = 32  # files below a recipe; ours have 2
# a bare text in which YAML sees a comment
_HASH = re.compile(r"\s*(?:#|(?!-\s)[^\s\"'\[{&*!|>%@`].*\s#)", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------- load


def load(
    schema: type[T], path: str | Path, overrides: Sequence[str] = (), read: Callable[[Path], dict[Any, Any]] = read_yaml
) -> T:
    """Read ``path`` (YAML), lay ``overrides`` over it, return a checked instance of ``schema``.

    An override is ``a.b=value`` or an overlay: a YAML file that changes what is there and adds no optional section.
    Overlays are laid in their order, and all ``a.b=value`` are one layer over them. A YAML file may have a top-level
    ``base: other.yaml`` (relative to the file): it is merged under the file. Mappings merge, lists are replaced. A
    layer that changes a section's ``kind`` drops what the layers below it say for the other kind alone (see
    utils/variants.py). An enum is written by its value (or name). ``__post_init__`` may raise ``ValueError``: when the
    message begins with a field's name, the path of the section is put before it.
    ``read`` gives the values of a file that is there.

    Raises ConfigError: missing or malformed file, unknown key, wrong type, illegal value, failed ``__post_init__``.
    """
    overlays = [text for text in overrides if is_overlay(text)]
    pairs = [text for text in overrides if not is_overlay(text)]
    overriding: dict[Any, Any] = functools.reduce(merged, map(_parse_override, pairs), {})
    values = _layered(schema, {}, _read_chain(Path(path), (), read))
    for overlay in overlays:
        layers = _read_chain(Path(overlay), (), read)
        values = _layered(schema, values, [without_absent(schema, values, _layered(schema, {}, layers))])
    return from_plain(schema, _layered(schema, values, [overriding]))


def is_overlay(override: str) -> bool:
    """Whether an override is a YAML file to lay over the first one, not ``key=value``."""
    return "=" not in override and Path(override).suffix in YAML


def _layered(schema: type, values: dict[Any, Any], layers: Sequence[dict[Any, Any]]) -> dict[Any, Any]:
    for layer in layers:
        _refuse_colons(layer, "")
    return functools.reduce(functools.partial(laid, schema), layers, values)


def _refuse_colons(values: Any, path: str) -> None:
    """Raises ConfigError for `{dim:96}`, which YAML reads as a key "dim:96" without a value."""
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        where = f"{path}.{key}" if path and isinstance(key, str) else f"{path}[{key}]" if path else str(key)
        if isinstance(key, str) and ":" in key and value is None:
            name, _, meant = key.partition(":")
            raise ConfigError(
                f"{path or 'the top level'}: {key!r} has no space after the colon, so YAML takes it for a name: write "
                f"{{{name}: {meant}}}"
            )
        if isinstance(value, (Mapping, list)):
            _refuse_colons(value, where)


def from_plain(
    schema: type[T], plain: Mapping[str, Any], *, other_kinds: Literal["refused", "dropped"] = "refused"
) -> T:
    """The inverse of ``to_plain``: a checked instance of ``schema``. Raises ConfigError as ``load`` does.

    other_kinds: what becomes of keys that a section has in another kind alone; "dropped" is for what earlier versions
        saved, whose sections had the keys of all kinds.
    """
    refuse_calls(plain, "")
    if other_kinds == "dropped":
        plain = without_other_kinds(schema, plain)
    node = _blank(schema)
    _apply(node, schema, plain, "", schema)
    check_references(node, plain, "")
    return _instantiate(node, schema)


def _blank(schema: type) -> DictConfig:
    """The typed node of all defaults. Copied, as to make it takes ten times as long."""
    return copy.deepcopy(_first_blank(schema))


@functools.cache
def _first_blank(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _read_chain(path: Path, seen: tuple[Path, ...], read: Callable[[Path], dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Plain contents of ``path`` preceded by those of its bases, furthest first."""
    resolved = path.resolve()
    if len(seen) >= BASES:
        raise ConfigError(f"base: more than {BASES} files lie below {seen[0].name}: put them together")
    if resolved in seen:
        raise ConfigError(f"base: cycle {' -> '.join(p.name for p in (*seen, resolved))}: remove one `base:` line")
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} {absent(path, YAML)}")
    values = read(path)
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise ConfigError(f"base: {show(base)} in {path} is not a path: give one YAML file relative to this one")
    target = path.parent / base
    if not target.is_file():
        raise ConfigError(f"base: {base!r} in {path} {absent(target, YAML)}")
    return [*_read_chain(target, (*seen, resolved), read), values]


def _parse_override(text: str) -> dict[Any, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(
            f"override {text!r} is not of the form key=value (for instance seed=1 or training.max_steps=100), and no "
            "YAML file"
        )
    if key.count(".") > DEPTH:
        raise ConfigError(f"override {show(text)}: no key lies so deep")
    if _HASH.match(value):
        value = json.dumps(value.strip(), ensure_ascii=False)  # no comment: nobody writes one on a command line
        text = f"{key}={value}"
    with reading("override", show(text), "close its brackets or quote it", error=ConfigError):
        try:
            check_yaml(value, f"override {show(text)}")
            return OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)  # type: ignore[return-value]
        except (yaml.YAMLError, OmegaConfBaseException):
            remedy = f"close its ${{...}}, or {LITERAL}" if "${" in value else "close its brackets or quote it"
            raise ConfigError(f"{key}: {show(value)} is not a valid YAML value: {remedy}") from None


# -------------------------------------------------------------------------------------------- user values -> typed node


def _apply(node: DictConfig, schema: type, values: Mapping[Any, Any], path: str, root: type) -> None:
    """Write user ``values`` into the structured ``node``, leaf by leaf, so that each error has its path."""
    hints = field_types(schema)
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"{where}: unknown key (value {show(value)}): {suggest(str(key), schema, path, root)}")
        hint = hints[key]
        section = section_type(hint)
        if section is not None and isinstance(value, Mapping):
            if has_variants(section):
                section, value = _variant(section, value, where)
                node[key] = _blank(section)
            elif OmegaConf.is_missing(node, key) or node[key] is None:
                OmegaConf.update(node, key, _blank(section))
            _apply(node[key], section, value, where, root)
        else:
            _set_leaf(node, key, _convert(value, hint, where, root), hint, where)


def _variant(section: Any, values: Mapping[Any, Any], where: str) -> tuple[type, Mapping[Any, Any]]:
    """Which of a section's variants `kind` names, and the values without what only other variants have.

    A key of another variant may stay at its default, as saved runs of earlier versions have it; any other value is
    refused.
    """
    variants: Mapping[str, type] = section.variants()
    kind = kind_in(section, values)
    if isinstance(kind, str) and "${" in kind:
        raise ConfigError(f"{where}.kind: {show(kind)}: the kind decides which keys there are: write it out")
    if not isinstance(kind, str) or kind not in variants:
        near = difflib.get_close_matches(str(kind), list(variants), n=1)
        hinted = f"did you mean {near[0]!r}? allowed: " if near else "give "
        raise ConfigError(f"{where}.kind: {show(kind)} is not allowed: {hinted}one of {', '.join(variants)}")
    legal, kept = field_types(variants[kind]), {}
    for key, value in values.items():
        owners = {name: variant for name, variant in variants.items() if key in field_types(variant)}
        if key in legal or not owners:
            kept[key] = value
        elif not all(_is_default(variant, str(key), value) for variant in owners.values()):
            others = ", ".join(owners)
            raise ConfigError(
                f"{where}.{key}={show(value)}: {key} is not for kind {kind}: leave it out, or choose {others}"
            )
    return variants[kind], kept


def _is_default(schema: type, key: str, value: Any) -> bool:
    field = next(field for field in dataclasses.fields(schema) if field.name == key)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    plain = to_plain(default)
    if isinstance(plain, dict):  # null takes a section away, and what a section does not say is at its default
        return value is None or (isinstance(value, Mapping) and merged(plain, value) == plain)
    return bool(plain == value)


def _set_leaf(node: DictConfig, key: str, value: Any, hint: Any, where: str) -> None:
    try:
        OmegaConf.update(node, key, value, merge=not isinstance(value, (list, ListConfig)))
    except (OmegaConfBaseException, ValueError):
        section: Any = section_type(hint)
        if has_variants(section) and value in list(section.variants()):
            raise ConfigError(f"{where}: {show(value)} is a kind of this section: write {where}.kind={value}") from None
        empty = f' (the empty one is ""; on a command line {where}=\'""\')' if value is None and hint is str else ""
        raise ConfigError(f"{where}: {show(value)} is not allowed: give {describe(hint)}{empty}") from None


def _convert(value: Any, hint: Any, where: str, root: type) -> Any:
    """Enum values to members and mappings in lists to sections; everything else is OmegaConf's to check."""
    options = options_of(hint)
    if value is None:
        return value
    if str in options and isinstance(value, (bool, int, float)) and not {bool, int, float} & set(options):
        raise ConfigError(
            f"{where}: {show(value)} is not allowed: give {describe(hint)}, in quotes (bare no, 010 and 12:30:45 are a "
            f"""boolean and numbers in YAML; on a command line {where}='"..."')"""
        )
    if float in options and _is_unbounded(value):
        raise ConfigError(f"{where}: {show(value)} is not allowed: give {describe(hint)} that is finite")
    if bool in options and not isinstance(value, bool) and not _names_bool(value):
        raise ConfigError(f"{where}: {show(value)} is not allowed: give {describe(hint)}")
    if int in options and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: {show(value)} is not allowed: give {describe(hint)} of at most 63 bits")
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            return _enum_member(option, value, hint, where)
        items = typing.get_args(option)
        if typing.get_origin(option) in (list, tuple) and items and isinstance(value, (list, tuple)):
            return [_convert_item(item, items[0], f"{where}[{i}]", root) for i, item in enumerate(value)]
    return value


def _names_bool(value: Any) -> bool:
    return isinstance(value, str) and (value.lower() in ("true", "false") or "${" in value)


def _is_unbounded(value: Any) -> bool:
    """Whether a value, maybe a text, is infinite or not a number."""
    try:
        return not math.isfinite(float(value))
    except OverflowError:  # a whole number beyond all floats
        return True
    except (TypeError, ValueError):
        return False  # no number at all, which is refused when it is set


def _convert_item(value: Any, hint: Any, where: str, root: type) -> Any:
    section = section_type(hint)
    if section is None or not isinstance(value, Mapping):
        return _convert(value, hint, where, root)
    node = _blank(section)
    _apply(node, section, value, where, root)
    return node


def _enum_member(enum: type[Enum], value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, str) and "${" in value:
        return value
    for member in enum:
        if value == member.value or value == member.name or (isinstance(value, enum) and value is member):
            return member
    quote = " (in quotes: bare yes, no, on and off are booleans in YAML)" if isinstance(value, bool) else ""
    near = difflib.get_close_matches(str(value), [str(member.value) for member in enum], n=1)
    hinted = f"did you mean {near[0]!r}? allowed: " if near else "give "
    raise ConfigError(f"{where}: {show(value)} is not allowed: {hinted}{describe(hint)}{quote}")


# ------------------------------------------------------------------------------------------- typed node -> dataclass


def _instantiate(node: DictConfig, schema: type[T]) -> T:
    try:
        return typing.cast(T, OmegaConf.to_object(node))
    except MissingMandatoryValue as error:
        hint = hint_at(schema, str(error.full_key))
        raise ConfigError(f"{error.full_key}: has no value and no default: give {describe(hint)}") from None
    except OmegaConfBaseException as error:
        where, problem = error.full_key or "a section in ${...}", str(error.msg).partition("\n")[0]
        raise ConfigError(f"{where}: {problem}: name an existing key of the same type in ${{...}}") from None
    except ValueError as error:
        path, owner, message = _locate(node, schema, "", str(error))
        first = re.match(r"\w*", message)
        glue = "" if not path else "." if first and first[0] in field_types(owner) else ": "
        raise ConfigError(path + glue + message) from None


def _locate(node: DictConfig, schema: type, path: str, message: str) -> tuple[str, type, str]:
    """(path, class, message) of the innermost section whose ``__post_init__`` refuses."""
    for key, hint in field_types(schema).items():
        section = section_type(hint)
        if section is None or OmegaConf.is_missing(node, key) or node[key] is None:
            continue
        try:
            OmegaConf.to_object(node[key])
        except ValueError as error:
            section = OmegaConf.get_type(node[key]) or section  # the variant that was chosen
            return _locate(node[key], section, f"{path}.{key}" if path else key, str(error))
    return path, schema, message


# ------------------------------------------------------------------------------------------------- dataclass -> text


def to_plain(config: Any) -> Any:
    """Dataclass (or mapping) -> dicts, lists and scalars as YAML or JSON would hold them; enums by value.

    A text's `${` is `\\${`, for a config that is read puts in the values of other keys. A field whose metadata has
    `saved_as` is what that makes of its value: secrets are not kept.
    """
    if isinstance(config, str) and not isinstance(config, Enum):
        return literal(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: _plain_field(field, getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value if isinstance(config.value, (str, int, float)) else config.name
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return to_plain(str(config)) if isinstance(config, Path) else config


def _plain_field(field: dataclasses.Field[Any], value: Any) -> Any:
    return to_plain(field.metadata["saved_as"](value) if "saved_as" in field.metadata else value)


def to_yaml(config: Any) -> str:
    """YAML text which ``load`` reads back to an equal config, but for secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def save(config: Any, path: str | Path) -> None:
    """Write ``to_yaml(config)``; folders on the way are made. Raises Unwritten."""
    write_text(Path(path), to_yaml(config))


if __name__ == "__main__":  # `python -m utils.config import` of version 0.1
    import sys

    from utils.moved import run_moved

    del sys.argv[1:2]
    run_moved("import_recipe.py", "python -m utils.config import")
