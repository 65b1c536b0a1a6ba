"""A translated recipe as people read it: the YAML with what it says at its head, and the table of --check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from importers.recipe import Line, Outcome, Recipe
from utils.fields import show

NOTHING = "(nothing)"


def to_text(recipe: Recipe, source: str) -> str:
    """The YAML, below a header that says where it is from, what is not in it, what differs and what is to be added."""
    left = [line for line in recipe.lines if line.outcome is Outcome.left_out]
    defaults = [line for line in recipe.lines if line.is_default and line.outcome is Outcome.carried]
    same = [line for line in recipe.lines if line.outcome is Outcome.same and not line.is_default]
    parts = [
        ("Left out, though it may change the result", [_with_reason(line) for line in left]),
        ("Without effect on the result here", [_with_reason(line) for line in same]),
        ("Not in the file, and as its code has it then", [f"{line.option}: {show(line.value)}" for line in defaults]),
        ("Means something else here", [f"{key}: {why}" for key, why in differences(recipe).items()]),
        ("To fill in", [f"{key}: {what}" for key, what in recipe.missing.items()]),
    ]
    lines = [f"# Translated from {source}."]
    for title, entries in parts:
        lines += [f"# {title}:", *(f"#   {entry}" for entry in entries)] if entries else []
    body = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return "\n".join(lines) + "\n" + body


def _with_reason(line: Line) -> str:
    return f"{line.option}: {show(line.value)} ({line.why})"


def differences(recipe: Recipe) -> dict[str, str]:
    """By our key, how its meaning differs: what a dialect noted, and what the rules say of the options in the file."""
    found: dict[str, str] = {}
    for line in recipe.lines:
        if line.outcome is Outcome.carried and line.why:
            found |= dict.fromkeys(line.keys, line.why)
    return {**found, **recipe.notes}


def table(recipe: Recipe) -> str:
    """Theirs, ours, and how it differs: an option a line, and then the keys of ours that no option decides."""
    rows = [("theirs", "ours", "how it differs")]
    decided: set[str] = set()
    for line in recipe.lines:
        decided |= set(line.keys)
        default = " (their default)" if line.is_default else ""
        rows.append((f"{line.option}: {show(line.value)}{default}", _ours(recipe, line), _remark(recipe, line)))
    for key, value in leaves(recipe.values):
        if key not in decided:
            rows.append(("(no option)", f"{key}: {show(value)}", recipe.notes.get(key, "")))
    rows += [("(not in the file)", key, f"to fill in: {what}") for key, what in recipe.missing.items()]
    rows += [("(the whole file)", "", f"refused: {why}") for why in recipe.refused]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * len("how it differs")))
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows) + "\n"


def _ours(recipe: Recipe, line: Line) -> str:
    if line.outcome is not Outcome.carried:
        return NOTHING
    found = dict(leaves(recipe.values))
    inside = {k: v for k, v in found.items() if any(k == key or k.startswith(f"{key}.") for key in line.keys)}
    return ", ".join(f"{key}: {show(value)}" for key, value in inside.items()) or NOTHING


def _remark(recipe: Recipe, line: Line) -> str:
    if line.outcome is Outcome.carried:
        noted = [recipe.notes[key] for key in line.keys if key in recipe.notes]
        idle = "no effect beside the other options" if _ours(recipe, line) == NOTHING else ""
        return "; ".join(dict.fromkeys(filter(None, [line.why, *noted]))) or idle
    return f"{line.outcome.value}: {line.why}"


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of what is no section. An empty section is none either."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
