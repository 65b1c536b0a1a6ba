"""A recipe in the making, and the rules that carry another project's options over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Untranslated(ValueError):
    """An option's value has no counterpart here; the message says why, or what to do instead."""


@dataclass
class Recipe:
    """A run in the making.

    values: our keys, nested.
    left: options that were not carried over, and why.
    notes: what differs in meaning.
    missing: our keys that the file cannot tell.
    """

    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def fill(self, key: str, what: str) -> None:
        """Lists a key that is to be filled in by hand."""
        self.missing.append(f"{key} ({what})")

    def set(self, path: str, value: Any) -> None:
        """Sets one of our keys, as in `recipe.set("ema.decay", 0.99)`."""
        *sections, key = path.split(".")
        node = self.values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value

    def get(self, path: str) -> Any:
        """What was set, or None."""
        node: Any = self.values
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node


# An option's rule: our key, a function of (recipe, value) that sets what it means, or None for what means nothing here.
Rule = str | Callable[[Recipe, Any], None] | None


@dataclass(frozen=True)
class Dialect:
    """One project's way to write a recipe.

    rules: of its options, by name.
    start: our keys and values that hold before its options are read.
    finish: what can be done only after all options are read.
    """

    rules: Mapping[str, Rule]
    start: Mapping[str, Any]
    finish: Callable[[Recipe], None]
