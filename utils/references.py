"""`${another.key}` in a config: what may be put in that way, and a text that has these characters itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import ConfigError
from utils.fields import show
from utils.yaml_files import LITERAL

# `${name:...}`, which has OmegaConf call a function; a backslash before it makes it text, but two stand for one
_CALL = re.compile(r"(?<!\\)(?:\\\\)*(\$\{(?:[^{}]|\$?\{[^{}]*\})*?:)")
_OPENED = re.compile(r"(\\*)\$\{")
_ENVIRONMENT = re.compile(r"\boc\.env\s*:\s*([^,{}]*)")


def refuse_calls(value: Any, where: str) -> None:
    """Raises ConfigError for a text that has OmegaConf call a function, such as `${oc.env:HOME}`: a config says all
    that it means, and a run folder is another machine's too."""
    if isinstance(value, str) and (found := _CALL.search(value)):
        if name := _ENVIRONMENT.search(value):
            remedy = f"{name[1] or 'it'} is of this machine's environment: write its value, or give it as {where}=VALUE"
        else:
            remedy = f"only ${{another.key}} can be put in: write the value out, or {LITERAL}"
        raise ConfigError(f"{where}: {show(value)} calls {found[1][2:-1].strip() or 'a function'}: {remedy}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_calls(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            refuse_calls(item, f"{where}[{number}]")


def check_references(node: DictConfig, value: Any, where: str) -> None:
    """Raises ConfigError, which names the key, for a `${...}` whose value is not there or of another type."""
    if isinstance(value, str) and "${" in value:
        try:
            OmegaConf.select(node, where, throw_on_resolution_failure=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            problem = str(error).partition("\n")[0]
            raise ConfigError(
                f"{where}: {show(value)}: {problem}: name an existing key of the same type in ${{...}}, or {LITERAL}"
            ) from None
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_references(node, item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            check_references(node, item, f"{where}[{number}]")


def literal(text: str) -> str:
    """A text as a YAML must say it, so that each `${` in it stands for itself."""
    return _OPENED.sub(r"\1\1\\${", text)
