"""Recipes of other projects as ours: `python import_recipe.py self_forcing|simpletuner|fastvideo FILE`.

A table for each project (`importers/tables.py`) says what becomes of each option. Options that it does not
know, or that cannot be carried over, are listed: nothing is dropped in silence.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from importers.recipe import Dialect, Recipe, Untranslated
from utils.errors import ConfigError
from utils.reading import reading
from utils.yaml_files import check_yaml, recipe_text


def translate(dialect: Dialect, options: Mapping[str, Any]) -> Recipe:
    """Carries over what it can; each option ends either in ``values`` or in ``left``."""
    recipe = Recipe()
    for path, value in dialect.start.items():
        recipe.set(path, copy.deepcopy(value))
    for name, value in options.items():
        shown = f"{name}: {json.dumps(value, ensure_ascii=False)}"
        if name not in dialect.rules:
            recipe.left.append(f"{shown} (unknown here)")
            continue
        rule = dialect.rules[name]
        try:
            if rule is None:
                raise Untranslated("of its own program, logging or storage")
            if isinstance(rule, str):
                recipe.set(rule, value)
            else:
                rule(recipe, value)
        except Untranslated as why:
            recipe.left.append(f"{shown} ({why})")
        except (TypeError, ValueError) as problem:
            raise ConfigError(f"{shown} is not what this option takes ({problem}): mend the file") from None
    dialect.finish(recipe)
    return recipe


def read_options(path: Path) -> dict[str, Any]:
    """The options of a YAML, JSON or shell recipe, flat: of nested YAML or JSON by `a.b`, of a command by `--name`.

    Raises ConfigError.
    """
    text = recipe_text(path)
    if path.suffix in (".sh", ".slurm", ".bash"):
        return shell_options(text, path)
    with reading("recipe", path, "fix it", says="is neither YAML nor JSON", error=ConfigError):
        check_yaml("" if path.suffix == ".json" else text, path)
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(f"{path}: holds no options: give a file of `key: value` lines")
    return _flat(loaded)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{str(key).lstrip('-')}"
        out |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out


_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=([^\s(]\S*|\"[^\"]*\"|'[^']*')\s*(?:#.*)?$", re.MULTILINE)


MANY = ("lora_target_modules",)  # options that take all words up to the next one


def shell_options(text: str, path: Path) -> dict[str, Any]:
    """`--name value`, `--name=value` and bare `--name` of all commands and arrays in a script; `$NAME` is put in, and
    `--some-name` is `some_name`. Several values (see MANY) are joined by commas.

    Options of torchrun stand before the first `.py` and are not the recipe's.
    """
    known = {name: value.strip("\"'") for name, value in _ASSIGNMENT.findall(text)}
    text = re.sub(r"torchrun.*?\.py\b", "", text.replace("\\\n", " "), flags=re.DOTALL)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell script that can be read ({error}): close its quotes") from None
    options: dict[str, Any] = {}
    for i, word in enumerate(words):
        if not word.startswith("--") or len(word) < 3:
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        follow = list(itertools.takewhile(lambda w: not w.startswith("--") and w not in ("(", ")"), words[i + 1 :]))
        if not equals:
            value = "true" if not follow else ",".join(follow) if name in MANY else follow[0]
        options[name] = _plain(re.sub(r"\$\{?(\w+)\}?", lambda m: known.get(m[1], m[0]), value))
    if not options:
        raise ConfigError(f"{path}: has no --option of a training command: give the script that starts the training")
    return options


def _plain(text: str) -> Any:
    """A word of a command as YAML would read it; `1e-5`, which YAML takes for text, is a number."""
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def to_text(recipe: Recipe, source: str) -> str:
    """The YAML, below a header that says where it is from, what is not in it, what differs and what is to be added."""
    lines = [f"# Translated from {source}. Not carried over:"]
    lines += [f"#   {line}" for line in recipe.left] or ["#   (nothing)"]
    for title, listed in (("Means something else here", recipe.notes), ("To fill in", recipe.missing)):
        lines += [f"# {title}:", *(f"#   {line}" for line in listed)] if listed else []
    body = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return "\n".join(lines) + "\n" + body
