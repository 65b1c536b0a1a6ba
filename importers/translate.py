"""From another project's options to a recipe of ours. `importers/dialects/` says what each option means.

Every option is carried over, has no effect on the result, or is refused: an unknown one is refused too. All that is
refused is told at once, and there is no recipe then.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from importers.networks import NETWORKS
from importers.python_syntax import Code
from importers.recipe import Dialect, Line, Outcome, Recipe, Untranslated
from utils.fields import show


def translate(
    dialect: Dialect, options: Mapping[str, Any], allow: Collection[str] = (), preset: str | None = None
) -> Recipe:
    """Their options as our keys; `refusals` says what of them is not understood.

    options: flat, by full name.
    allow: options that are left out where they would be refused.
    preset: geometry of models whose name does not tell it, None for none.
    """
    dialect = dialect.of(options)
    recipe = Recipe(form=dialect.name, aliases=dialect.aliases, staged={"preset": preset})
    for path, value in dialect.start.items():
        recipe.set(path, copy.deepcopy(value))
    absent = {name: value for name, value in dialect.defaults.items() if name not in options}
    for name, value in {**options, **absent}.items():
        if value == {} and dialect.rule(name) is None:
            continue  # an empty section
        recipe.lines.append(_line(dialect, recipe, name, value, is_default=name in absent))
        if recipe.lines[-1].outcome is Outcome.refused and name in dialect.defaults and name not in absent:
            _line(dialect, recipe, name, dialect.defaults[name], is_default=True)  # as if the file left it out
    _finish(dialect, recipe)
    for line in recipe.lines:
        if line.outcome is Outcome.refused and line.option in allow:
            line.outcome = Outcome.left_out
    for name in NETWORKS:
        if recipe.get(name) is not None and recipe.get(f"{name}.init") is None:
            recipe.refused.append(f"{name}: the file names no weights for it, and it would start from random ones")
    recipe.refused += [f"--allow {name}: the file has no such option" for name in allow if name not in options]
    return recipe


def _finish(dialect: Dialect, recipe: Recipe) -> None:
    """What options that are refused leave unsaid may end it early: they are told, and what it would add is not."""
    try:
        dialect.finish(recipe)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        if not any(line.outcome is Outcome.refused for line in recipe.lines):
            raise


SECRET = re.compile(r"key|token|secret|password|webhook", re.IGNORECASE)


def _line(dialect: Dialect, recipe: Recipe, name: str, value: Any, *, is_default: bool) -> Line:
    rule = dialect.rule(name)
    shown = "…" if SECRET.search(name) and value else value
    if rule is None:
        return Line(name, shown, is_default, (), Outcome.refused, "it is not known here")
    if isinstance(value, Code) and rule.keys:
        return Line(name, shown, is_default, rule.keys, Outcome.refused, "it is computed: write the value itself")
    try:
        rule.carry(recipe, copy.deepcopy(value))
    except Untranslated as problem:
        return Line(name, shown, is_default, rule.keys, Outcome.refused, str(problem))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        why = f"this is not what it takes ({problem}): mend the file"
        return Line(name, shown, is_default, rule.keys, Outcome.refused, why)
    return Line(name, shown, is_default, rule.keys, Outcome.carried if rule.keys else Outcome.same, rule.why)


def refusals(recipe: Recipe) -> list[str]:
    """What is not understood: the options with their values, and then what belongs to none of them."""
    refused = [line for line in recipe.lines if line.outcome is Outcome.refused]
    return [f"{line.option}: {show(line.value)}: {line.why}" for line in refused] + recipe.refused
