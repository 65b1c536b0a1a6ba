"""Commands of shell scripts as options, read as words: nothing is run, and no variable of this process is looked at."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from utils.errors import ConfigError

MANY = ("lora_target_modules",)  # options that take all words up to the next one
PROGRAM, BACKEND = "program", "env.FASTVIDEO_ATTENTION_BACKEND"  # what a script says beside its options
# variables that decide a result; of all others only what an option quotes is read
VARIABLES = {"FASTVIDEO_ATTENTION_BACKEND": BACKEND}

_ASSIGNMENT = re.compile(
    r"^\s*(?:export\s+|env\s+)?([A-Za-z_]\w*)=([^\s(]\S*|\"[^\"]*\"|'[^']*')\s*(?:#.*|\\)?$", re.MULTILINE
)
_VARIABLE = re.compile(r"\$\{(\w+):?-([^{}]*)\}|\$\{(\w+)\}|\$(\w+)")
_PROGRAM = re.compile(r"(?:torchrun|accelerate\s+launch|python3?)\b[^\n]*?([\w./$@{}-]+\.py|-m\s+[\w.]+)(?=\s|$)")
_HYDRA = re.compile(r"^\+{0,2}~?([A-Za-z_][\w./@]*)=(.*)$", re.DOTALL)


def shell_options(text: str, path: Path) -> dict[str, Any]:
    """`--name value`, `--name=value` and bare `--name` of all commands and arrays in a script, and `a.b=value` words
    that stand behind its program, as Hydra takes them.

    `$NAME` and `${NAME:-default}` are put in from the script's own lines, and `--some-name` is `some_name`. The program
    is the option `program`. Options of the launcher stand before it and are not the recipe's. Of several values of one
    option the last counts; several words (see MANY) are joined by commas. Raises ConfigError.
    """
    known: dict[str, str] = {}
    for name, value in _ASSIGNMENT.findall(text):
        known[name] = _filled(value.strip("\"'"), known)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", " ")
    options = _environment(text, known)
    program = re.search(
        r"(?:torchrun|accelerate\s+launch|python3?)\b[^\n]*?([\w./$@{}-]+\.py|-m\s+[\w.]+)(?=\s|$)", text
    )
    if program is not None:
        options[PROGRAM] = _filled(program[1], known).rpartition("/")[2].removeprefix("-m").strip()
        text = text[: program.start()] + " ; " + text[program.end() :]
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = [_filled(word, known) for word in lexer]
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell script that can be read ({error}): close its quotes") from None
    found = {**_dashed(words), **_dotted(words)}
    if not found:
        raise ConfigError(f"{path}: has no --option of a training command: give the script that starts the training")
    return {**options, **found}


def _environment(text: str, known: dict[str, str]) -> dict[str, Any]:
    """What VARIABLES are set to, also in front of a command; of several values the last counts."""
    options: dict[str, Any] = {}
    for name, option in VARIABLES.items():
        for value in re.findall(rf"(?<![\w$]){name}=(\"[^\"]*\"|'[^']*'|[^\s;]+)", text):
            options[option] = _filled(value.strip("\"'"), known)
    return options


def _filled(word: str, known: dict[str, str]) -> str:
    """The word with the script's variables in it; one that it does not set stays as it is, or takes the default."""
    return _VARIABLE.sub(lambda m: known.get(m[1] or m[3] or m[4], m[2] if m[1] else m[0]), word)


def _dashed(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for i, word in enumerate(words):
        if not word.startswith("--") or len(word) < 3:
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        follow = list(
            itertools.takewhile(lambda w: not w.startswith("--") and not set(w) <= set("();"), words[i + 1 :])
        )
        if not equals:
            value = "true" if not follow else ",".join(follow) if name in MANY else follow[0]
        options[name] = plain(value)
    return options


def _is_value(word: str) -> bool:
    return not word.startswith("--") and not set(word) <= set("();")


def _dotted(words: list[str]) -> dict[str, Any]:
    """`a.b=value` of Hydra: words that are no option's value and hold a dot or are `experiment`."""
    found = (_HYDRA.match(word) for word in words if not word.startswith("-"))
    return {m[1]: plain(m[2]) for m in found if m is not None and ("." in m[1] or m[1] == "experiment")}


def plain(text: str) -> Any:
    """A word of a command as YAML would read it; `1e-5`, which YAML takes for text, is a number."""
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text
