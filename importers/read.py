"""Recipe files as flat options: `a.b` of nested YAML or JSON, the words of a command (`importers/shell.py`), or
assignments of Python (`importers/python_syntax.py`). Nothing of a file is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from importers.python_syntax import python_options
from importers.shell import shell_options
from utils.errors import ConfigError
from utils.reading import reading
from utils.yaml_files import read_yaml, recipe_text

SHELL = (".sh", ".slurm", ".bash", ".sbatch")


def read_options(*paths: Path) -> dict[str, Any]:
    """The options of these files by full name; those of a later file take the place of an earlier one's.

    Raises ConfigError.
    """
    options: dict[str, Any] = {}
    for path in paths:
        options |= _options_of(path)
    return options


def _options_of(path: Path) -> dict[str, Any]:
    text = recipe_text(path)
    if path.suffix in SHELL:
        return shell_options(text, path)
    if path.suffix == ".py":
        return python_options(text, path)
    loaded = _json(text, path) if path.suffix == ".json" else read_yaml(path)
    options = flat(named(loaded, "backend") if isinstance(loaded, list) else loaded)
    if not options or all(value == {} for value in options.values()):
        raise ConfigError(f"{path}: holds no options: give a file of `key: value` lines")
    return options


def _json(text: str, path: Path) -> Any:
    """Sections, or a list of them. Raises ConfigError, also for a name that stands twice in a section."""
    with reading("recipe", path, "fix it", says="is not valid JSON", error=ConfigError):
        loaded = json.loads(text, object_pairs_hook=_section)
    if isinstance(loaded, dict) or (isinstance(loaded, list) and all(isinstance(entry, dict) for entry in loaded)):
        return loaded
    raise ConfigError(f"{path}: holds no options: give a file of sections")


def _section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice in a section")
    return section


def named(entries: Sequence[Mapping[str, Any]], word: str) -> dict[str, Any]:
    """A list of sections, such as SimpleTuner's data backends, as one mapping by their `id` or number."""
    return {f"{word}.{entry.get('id', number)}": entry for number, entry in enumerate(entries)}


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping by full name; an empty one is a value. Leading dashes of a name, as some JSON
    recipes have them, are left out."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{str(key).lstrip('-')}"
        out |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return out
