"""A run's config from its YAML or from what a checkpoint holds, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.checks import check_run
from configs.earlier import completed
from configs.schema import RunConfig
from utils.config import from_plain, is_overlay, load
from utils.errors import ConfigError
from utils.yaml_files import read_yaml


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with ``key=value`` and overlays laid over it. Raises ConfigError.

    What an earlier version saved is read as that version meant it.
    """
    overlays = [Path(text) for text in overrides if is_overlay(text)]
    _refuse_swapped(Path(path), overlays)
    _refuse_recipes(overlays)
    return checked(load(RunConfig, path, overrides, read=lambda file: completed(read_yaml(file))))


def _refuse_swapped(path: Path, overlays: Sequence[Path]) -> None:
    """Raises ConfigError for an overlay in the place of the recipe, and the recipe after it."""

    if path.is_file() and not _says(path, "base", "trainer", "name"):
        for overlay in overlays:
            if _says(overlay, "base", "trainer"):
                raise ConfigError(f"{path} is an overlay, and {overlay} a recipe: give the recipe first")


def _refuse_recipes(overlays: Sequence[Path]) -> None:
    """Raises ConfigError for an overlay with a base: all keys of the base would silently replace the recipe's."""
    for overlay in overlays:
        if _says(overlay, "base"):
            raise ConfigError(
                f"{overlay} has `base:`, so it is a recipe, and its base would replace what the recipe before it says: "
                "give it alone, or lay a file without `base:` over the recipe"
            )


def _says(file: Path, *keys: str) -> bool:
    return file.is_file() and any(key in read_yaml(file) for key in keys)


def run_from_plain(values: Mapping[str, Any]) -> RunConfig:
    """The run that nested mappings describe. Raises ConfigError."""
    return checked(from_plain(RunConfig, values))


def run_from_state(values: Mapping[str, Any]) -> RunConfig:
    """The run of a checkpoint, which an earlier version may have saved. Raises ConfigError.

    Sections of version 0.1 had the keys of all their kinds: those that did nothing are left out.
    """
    return checked(from_plain(RunConfig, completed(values), other_kinds="dropped"))


def checked(config: RunConfig) -> RunConfig:
    """`config` itself. Raises ConfigError, one line, where its sections cannot work together."""
    try:
        check_run(config)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    return config
