"""Recipes of other projects as tests import them. `recipes/` holds one of each dialect, written for these tests, with
each option that its table knows once.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from configs.load import run_from_plain
from configs.schema import RunConfig
from importers.dialects import DIALECTS
from importers.read import read_options
from importers.recipe import Dialect, Outcome, Recipe
from importers.translate import refusals, translate

RECIPES = Path(__file__).parent / "recipes"
REFUSED_RECIPES = Path(__file__).parent / "refused_recipes"  # whole recipes that no run here is like


@cache
def _read(files: tuple[Path, ...]) -> dict[str, Any]:
    return read_options(*files)


def options_of(*files: Path) -> dict[str, Any]:
    """The options of files that no test changes, read once."""
    return copy.deepcopy(_read(files))


def recipe_of(dialect: str, options: dict[str, Any], *allow: str, preset: str | None = None) -> Recipe:
    return translate(DIALECTS[dialect], options, allow, preset)


def imported(dialect: str, *files: Path, **changes: Any) -> tuple[Recipe, RunConfig]:
    """A recipe that nothing of is refused, and its run. changes: options in place of the files' own."""
    recipe = recipe_of(dialect, {**(options_of(*files) if files else {}), **changes})
    assert refusals(recipe) == []
    return recipe, run_from_plain(recipe.values)


def refused(dialect: str, options: dict[str, Any]) -> dict[str, str]:
    """Options that are refused, and why; what belongs to none stands under ""."""
    recipe = recipe_of(dialect, options)
    found = {line.option: line.why for line in recipe.lines if line.outcome is Outcome.refused}
    return {**found, **({"": "\n".join(recipe.refused)} if recipe.refused else {})}


def cases() -> list[tuple[Path, ...]]:
    """The files of each recipe: a file whose name ends with `_second` belongs to the one before it."""
    return _grouped(RECIPES)


def all_cases() -> list[tuple[Path, ...]]:
    """Those of `cases`, and the recipes that are refused as a whole."""
    return [*cases(), *_grouped(REFUSED_RECIPES)]


def _grouped(folder: Path) -> list[tuple[Path, ...]]:
    files = sorted(file for file in folder.iterdir() if not file.stem.endswith("_second"))
    return [(file, *file.parent.glob(f"{file.stem}_second.*")) for file in files]


def dialect_of(file: Path) -> str:
    """The dialect that a file of `recipes/` is named after, as `longlive2_ar.yaml` is of `longlive2`."""
    return max((name for name in DIALECTS if file.stem.startswith(name)), key=len)


def form_of(dialect: str, options: dict[str, Any]) -> Dialect:
    return DIALECTS[dialect].of(options)


REFUSED: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "refused.yaml").read_text())


def base_of(form: str) -> tuple[str, dict[str, Any]]:
    """The first recipe that options of `refused.yaml` are laid over: its dialect, and its options."""
    wanted, _, kind = form.partition(", modular, ")
    for files in all_cases():
        dialect, options = dialect_of(files[0]), options_of(*files)
        name = form_of(dialect, options).name
        if name == form or (kind and name == f"{wanted}, modular" and "method.chunk_size" in options):
            return dialect, options
    raise AssertionError(f"no recipe of {form}")
