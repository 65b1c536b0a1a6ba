"""YAML as plain values, looked through before anything is made of it.

An alias may repeat what repeats others, so that a file of 300 bytes stands for a billion values. Values are counted as
often as they are repeated, and what is no text, number, list or section in YAML is refused by its place.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import ConfigError
from utils.limits import check_size
from utils.reading import reading

DEPTH = 32  # lists and sections in each other; a recipe has 5
LITERAL = r"write \${ for these characters themselves (\\${ within double quotes)"
_TAG = "tag:yaml.org,2002:"
_TAGS = {None, "!", *(f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq"))}
# whole numbers that YAML reads in base 8 and 60, which nobody means: 010 is 8, 16:9 is 969
_OTHER_BASES = re.compile(r"[-+]?0[0-7_]*[0-7][0-7_]*|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def recipe_text(path: Path) -> str:
    """The text of a recipe. Raises ConfigError, also for one larger than `Limits.recipe`."""
    with reading("config", path, "give a readable file of `key: value` lines", error=ConfigError):
        check_size("recipe", path.stat().st_size, path, error=ConfigError)
        return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file, `${...}` as they are written. Raises ConfigError."""
    text = recipe_text(path)
    with reading("config", path, "fix the file", error=ConfigError):
        try:
            check_yaml(text, path)
            if not isinstance(top := yaml.safe_load(text), (dict, type(None))):
                raise ConfigError(f"{path}: holds a {type(top).__name__} at its top: write `key: value` lines")
            values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
            assert isinstance(values, dict)
            return values
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
            raise ConfigError(f"{place}: not valid YAML: {error.problem}: fix the file") from None
        except OmegaConfBaseException as error:
            where = f"{path}: {error.full_key}" if error.full_key else str(path)
            raise ConfigError(f"{where}: {error.msg}: close the ${{...}}, or {LITERAL}") from None


def check_yaml(text: str, where: object) -> None:
    """Raises ConfigError for YAML that is nested too deep, repeats too much, or repeats itself within itself, and for
    dates, bytes, sets, objects and numbers in base 8 or 60; yaml.YAMLError for what is no YAML."""
    sizes: dict[str, int] = {}  # of what is named by an anchor, without what is still open
    begun: list[tuple[str | None, int]] = []  # the anchors of open lists and sections, and how many values lie before
    count = 0
    for event in yaml.parse(text, Loader=_PARSER):
        line = f"{where}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{line}: *{event.anchor} stands for what it lies in, or for nothing: write it out")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            if event.tag not in _TAGS:
                name = event.tag.removeprefix(_TAG)
                raise ConfigError(f"{line}: !!{name} is neither text nor a number, list or section: write it as text")
            count += 1
            if isinstance(event, yaml.ScalarEvent) and not event.style and _OTHER_BASES.fullmatch(event.value):
                number = yaml.safe_load(event.value)
                raise ConfigError(f"{line}: {event.value} is the number {number} in YAML: write {number}, or quote it")
            if isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, count))
                sizes.pop(event.anchor or "", None)
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor is not None:
                sizes[anchor] = count - before + 1
        if len(begun) > DEPTH:
            raise ConfigError(f"{line}: is nested more than {DEPTH} deep: fix the file")
        check_size("nodes", count, line, error=ConfigError, unit="values")
