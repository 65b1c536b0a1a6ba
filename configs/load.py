"""A run's config from its YAML or from what a checkpoint holds, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.checks import check_run
from configs.schema import RunConfig
from utils.config import from_plain, load
from utils.errors import ConfigError


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with ``key=value`` and overlays laid over it. Raises ConfigError."""
    return checked(load(RunConfig, path, overrides))


def run_from_plain(values: Mapping[str, Any]) -> RunConfig:
    """The run that nested mappings describe. Raises ConfigError."""
    return checked(from_plain(RunConfig, values))


def run_from_state(values: Mapping[str, Any]) -> RunConfig:
    """The run of a checkpoint, which an earlier version may have saved. Raises ConfigError.

    Sections of version 0.1 had the keys of all their kinds: those that did nothing are left out.
    """
    return checked(from_plain(RunConfig, values, other_kinds="dropped"))


def checked(config: RunConfig) -> RunConfig:
    """`config` itself. Raises ConfigError, one line, where its sections cannot work together."""
    try:
        check_run(config)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    return config
