"""A recipe in the making, and the rules that carry another project's options over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any


class Untranslated(ValueError):
    """An option's value has no counterpart here; the message says why, or what to do instead."""


class Outcome(Enum):
    """What became of an option."""

    carried = "carried over"
    same = "no effect on the result"  # or the same here whatever a recipe says
    refused = "refused"
    left_out = "left out"  # it would be refused, and was allowed


@dataclass
class Line:
    """One option of theirs.

    option: its name.
    value: what it says.
    is_default: whether it is their default, which the file does not write.
    keys: ours that it decides.
    outcome: what became of it.
    why: of what was not carried over, the reason; else how its meaning differs here, "" for not at all.
    """

    option: str
    value: Any
    is_default: bool
    keys: tuple[str, ...]
    outcome: Outcome
    why: str = ""


@dataclass
class Recipe:
    """A run in the making.

    form: the table that its options are of.
    aliases: names of its options by those that `refuse` is told, where they differ.
    values: our keys, nested.
    staged: what rules leave for the dialect's `finish`, by names of their own.
    notes: by our key, how its meaning differs.
    missing: by our key, what the file cannot tell and is to be filled in.
    refused: what is not understood and belongs to no single option.
    lines: their options, in order.
    """

    form: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    staged: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

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

    def drop(self, path: str) -> None:
        """Takes one of our keys out, if it was set."""
        *sections, key = path.split(".")
        node: Any = self.values
        for section in sections:
            node = node.get(section, {})
        node.pop(key, None)

    def refuse(self, option: str, why: str) -> None:
        """Refuses an option of the file after all options are read, or what no single option says."""
        names = (option, self.aliases.get(option))
        line = next((line for line in self.lines if line.option in names or line.option.endswith(f".{option}")), None)
        if line is None:
            self.refused.append(f"{option}: {why}")
        else:
            line.outcome, line.why = Outcome.refused, why


Carry = Callable[[Recipe, Any], None]


@dataclass(frozen=True)
class Rule:
    """What becomes of an option.

    keys: ours that it decides; none for an option that changes nothing here.
    carry: sets them. Raises Untranslated for a value that has no counterpart here, and TypeError or ValueError for one
    that the option does not take.
    why: how its meaning differs, or why it has no effect; "" for the same meaning.
    """

    keys: tuple[str, ...]
    carry: Carry
    why: str = ""


@dataclass(frozen=True)
class Dialect:
    """One project's way to write a recipe.

    name: as import_recipe.py is told it.
    rules: of its options, by name, where `*` stands for any text.
    defaults: values of its options that a file leaves out, as its code has them.
    start: our keys and values that none of its options says.
    finish: what can be done only after all options are read.
    forms: tables of its other file forms, or of its other programs.
    fits: for one of such forms, whether options are of it.
    aliases: names of its options by those of the table that it shares rules with.
    """

    name: str
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    start: Mapping[str, Any]
    finish: Callable[[Recipe], None]
    forms: tuple[Dialect, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda options: True
    aliases: Mapping[str, str] = field(default_factory=dict)

    def of(self, options: Mapping[str, Any]) -> Dialect:
        """The first of its forms that these options are of; itself where it has none, or none fits."""
        return next((form for form in self.forms if form.fits(options)), self)

    def rule(self, option: str) -> Rule | None:
        """The option's rule; None if there is none."""
        if option in self.rules:
            return self.rules[option]
        patterns = (rule for name, rule in self.rules.items() if "*" in name and fnmatchcase(option, name))
        return next(patterns, None)
