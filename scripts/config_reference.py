"""`python -m scripts.config_reference` writes docs/configuration.md from the schema: keys, types, defaults, meanings.

A key's meaning is what its dataclass's docstring says after `key:`. Values of an enum are explained by the comments
beside its members. `tests/test_docs.py` fails while the page is stale.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from configs import rules
from configs.schema import RunConfig
from utils.cli import run_cli
from utils.config import to_plain
from utils.writing import write_text

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
WORDS = {float: "number", int: "whole number", str: "text", bool: "true or false", type(None): "null", Any: "value"}
HEAD = """# Configuration reference

<!-- written by `python -m scripts.config_reference`: change the docstrings of the schema, not this page -->

This page lists every key that a run's YAML may hold, with its type, its default and its meaning.
It is generated from the dataclasses of the schema, so it is what the program checks.
[Training a run](training.md) explains how a YAML file is written and how keys are overridden on the command line.

A key is written with its full path. Where several sections share their keys, the first path is shown and the others
are named above the table. A section whose default is null is left out of a run unless the YAML gives it.
"""


REFUSALS = """A run with one of these is refused before it starts, with this line. Where `…` is here, it has a value.
Sizes, steps and blocks that do not fit are refused too, with the numbers at fault."""
VALUE = re.compile(r"\{[^}]*\}")
TABLES: dict[str, Sequence[rules.Rule | rules.NetworkRule | rules.OptimizerRule]] = {
    "Distillation": rules.DISTILLATION,
    "Other trainers": rules.OTHER_TRAINERS,
    "Networks": rules.NETWORKS,
    "Optimizers": rules.OPTIMIZERS,
}


@dataclass
class Section:
    """A dataclass of the schema and every path at which a run's YAML may give it, the shortest first."""

    schema: type
    paths: list[str] = field(default_factory=list)


def sections(schema: type) -> list[Section]:
    """All sections in the order in which a reader of the YAML meets their shortest paths."""
    visited: list[tuple[str, type]] = []

    def visit(cls: type, path: str) -> None:
        visited.append((path, cls))
        for kind, variant in variants(cls).items():
            if own_keys(variant):
                visited.append((f"{path}, kind {kind}", variant))
                visit_nested(variant, path)
        visit_nested(cls, path)

    def visit_nested(cls: type, path: str) -> None:
        for key, hint in own_keys(cls).items():
            for nested in nested_schemas(hint):
                is_item = any(typing.get_origin(option) is list for option in options(hint))
                visit(nested, f"{path}.{key}".lstrip(".") + ("[]" if is_item else ""))

    visit(schema, "")
    found: dict[type, Section] = {}
    for path, cls in sorted(visited, key=lambda item: item[0].count(".")):  # a stable sort
        found.setdefault(cls, Section(cls)).paths.append(path)
    return [found[cls] for path, cls in visited if path == found[cls].paths[0]]


def hints(schema: type) -> dict[str, Any]:
    """Types of a dataclass's fields, by name."""
    resolved = typing.get_type_hints(schema)
    return {item.name: resolved[item.name] for item in dataclasses.fields(schema)}


def variants(schema: type) -> dict[str, type]:
    """A section's variants by their kind, none for most sections; a variant has none of its own."""
    return dict(schema.variants()) if "variants" in vars(schema) else {}  # type: ignore[attr-defined]


def own_keys(schema: type) -> dict[str, Any]:
    """Types of the keys that a section has; of a variant, those that the section it is a variant of lacks."""
    shared = [base for base in schema.__mro__[1:] if hasattr(base, "variants")]
    return {key: hint for key, hint in hints(schema).items() if not shared or key not in hints(shared[-1])}


def options(hint: Any) -> tuple[Any, ...]:
    """Members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def nested_schemas(hint: Any) -> Iterator[type]:
    """The dataclasses that a value of this type holds: itself, or its items."""
    for option in options(hint):
        for candidate in (option, *typing.get_args(option)):
            if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
                yield candidate


def type_in_words(hint: Any) -> str:
    """What may be written for a key: `number or null`, `one of a, b`."""
    return " or ".join(option_in_words(option) for option in options(hint))


def option_in_words(option: Any) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin in (list, tuple):
        return f"list of {plural(type_in_words(arguments[0]))}"
    if origin is dict:
        return "mapping"
    if isinstance(option, type) and issubclass(option, Enum):
        return "one of " + ", ".join(f"`{member.value}`" for member in option)
    if isinstance(option, type) and dataclasses.is_dataclass(option):
        return "section"
    return WORDS.get(option, str(option))


def plural(words: str) -> str:
    return {"number": "numbers", "whole number": "whole numbers", "text": "texts", "section": "sections"}.get(
        words, words
    )


def meanings(schema: type) -> tuple[str, dict[str, str]]:
    """(what the docstring says of the section, what it or that of a class above says of each key after `key:`)."""
    found: dict[str, str] = {}
    for base in schema.__mro__[-1:0:-1]:
        if dataclasses.is_dataclass(base):
            found |= meanings(base)[1]
    names = "|".join(sorted(hints(schema), key=len, reverse=True))
    text = " ".join(inspect.cleandoc(schema.__doc__ or "").split())
    if text.startswith(f"{schema.__name__}("):  # a dataclass without a docstring gets its signature for one
        return "", found
    parts = re.split(rf"(?:(?<=^)|(?<=[.;:] ))((?:{names})(?:, (?:{names}))*): ", text)
    for keys, said in zip(parts[1::2], parts[2::2], strict=True):
        for key in keys.split(", "):
            found[key] = sentence(said)
    return parts[0].strip(), found


def sentence(text: str) -> str:
    """A capital at its beginning and a full stop at its end."""
    text = text.strip().rstrip(";.")
    return text[:1].upper() + text[1:] + "." if text else ""


def member_notes(enum: type[Enum]) -> dict[str, str]:
    """The comment beside each member of an enum, by the member's value."""
    source = textwrap.dedent(inspect.getsource(enum))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    lines, notes = source.splitlines(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            comment = lines[node.lineno - 1].partition("  # ")[2]
            if comment:
                notes[str(node.value.value)] = comment
    return notes


def default_text(item: dataclasses.Field[Any]) -> str:
    """A field's default as YAML would write it, `required` where it has none."""
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return "see below"
    plain = to_plain(value)
    return f"`{plain if isinstance(plain, str) and plain else json.dumps(plain)}`"


def meaning(key: str, hint: Any, said: dict[str, str], kinds: dict[str, type]) -> str:
    """A table cell: the type, the docstring's sentence, and what each value of an enum, or each kind, is."""
    parts = [f"*{sentence(type_in_words(hint))}*"]
    nested = next(nested_schemas(hint), None)
    if key in said:
        parts.append(said[key])
    elif nested is not None:
        first = meanings(nested)[0].partition(". ")[0]
        parts.append(sentence(first))
    for kind, variant in kinds.items() if key == "kind" else ():
        parts.append(f"`{kind}`: {sentence(meanings(variant)[0].partition('. ')[0])}")
    for option in options(hint):
        if isinstance(option, type) and issubclass(option, Enum):
            parts += [f"`{value}`: {note}." for value, note in member_notes(option).items()]
    return " ".join(part for part in parts if part).replace("|", "\\|")


def section_text(section: Section) -> str:
    """The heading, the introduction and the table of a section."""
    path = section.paths[0]
    intro, said = meanings(section.schema)
    lines = [f"## {path or 'Top level'}", ""]
    if intro:
        lines += [intro, ""]
    if len(section.paths) > 1:
        also = ", ".join(f"`{other.removesuffix('[]')}`" for other in section.paths[1:])
        lines += [f"{also} {'has' if len(section.paths) == 2 else 'have'} the same keys.", ""]
    lines += [f"Defined by `{section.schema.__name__}` in `{section.schema.__module__.replace('.', '/')}.py`.", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    resolved, path = own_keys(section.schema), path.partition(",")[0]
    for item in dataclasses.fields(section.schema):
        if item.name not in resolved:
            continue
        key = f"{path}.{item.name}" if path and not path.endswith("[]") else item.name
        cell = meaning(item.name, resolved[item.name], said, variants(section.schema))
        lines.append(f"| `{key}` | {default_text(item)} | {cell} |")
    return "\n".join(lines)


def refusals() -> str:
    """The lines of configs/rules.py, by what they are about."""
    lines = ["## What cannot be combined", "", REFUSALS, ""]
    for title, table in TABLES.items():
        lines += [f"**{title}**", "", *(f"- `{VALUE.sub('…', rule.says)}`" for rule in table), ""]
    traits = (f"- {what}: `{trait.value}`" for trait, (what, _) in rules.TRAITS.items())
    return "\n".join([*lines, "**What needs a trait of the networks' family**", "", *traits])


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.strip(), *map(section_text, sections(RunConfig)), refusals()]) + "\n"


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m scripts.config_reference", description="Write docs/configuration.md from the schema."
    ).parse_args()
    write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(PAGE.parents[1])}")
    return 0


if __name__ == "__main__":
    run_cli(main)
