"""Rules that several dialects share. Each function makes the rule of one option; see `importers/recipe.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from importers.recipe import Carry, Recipe, Rule, Untranslated

STUDENT, CRITIC = "generator_training", "critic_training"


def real(value: Any) -> float:
    """A finite number, also as text such as `1e-5`, which YAML takes for no number. Raises ValueError."""
    number = math.nan if isinstance(value, bool) else float(value)
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def integer(value: Any) -> int:
    """A whole number, also as text. Raises ValueError."""
    if (number := real(value)) != int(number):
        raise ValueError("a whole number")
    return int(number)


MOST = 10**9  # of anything that is counted


def positive(value: Any) -> int:
    """A whole number of at least 1. Raises ValueError."""
    if not 1 <= (number := integer(value)) <= MOST:
        raise ValueError("a whole number of at least 1")
    return number


def optional(value: Any) -> float | None:
    """A number, or none. Raises ValueError."""
    return None if value is None else real(value)


def truth(value: Any) -> bool:
    """True or false, also as text. Raises ValueError."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError("true or false")
    return str(value).lower() == "true"


def listed(value: Any) -> list[Any]:
    """A list, or `1,2,3` or `1|2|3` as one. Raises TypeError."""
    if isinstance(value, str):
        return [part.strip() for part in value.replace("|", ",").split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else list(value)


def to(path: str, read: Callable[[Any], Any], why: str = "") -> Rule:
    """Our key is what `read` makes of the value."""
    return Rule((path,), lambda recipe, value: recipe.set(path, read(value)), why)


def number(path: str, why: str = "") -> Rule:
    return to(path, real, why)


def whole(path: str, why: str = "") -> Rule:
    return to(path, integer, why)


def count(path: str, why: str = "") -> Rule:
    return to(path, positive, why)


def flag(path: str, why: str = "") -> Rule:
    return to(path, truth, why)


def text(path: str, why: str = "") -> Rule:
    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("text")
        return value

    return to(path, read, why)


def plus_one(path: str) -> Rule:
    """A guidance scale s of cond + s (cond - uncond), which is w = s + 1 here."""
    return to(path, lambda value: real(value) + 1, "w = s + 1: theirs is added to the conditional")


def stage(name: str, read: Callable[[Any], Any], *keys: str, why: str = "") -> Rule:
    """Left for the dialect's `finish` under this name; keys: ours that it will decide."""
    return Rule(keys, lambda recipe, value: recipe.staged.update({name: read(value)}), why)


def both(key: str) -> Rule:
    """One number of both optimizers."""
    paths = tuple(f"{section}.optimizer.{key}" for section in (STUDENT, CRITIC))

    def carry(recipe: Recipe, value: Any) -> None:
        for path in paths:
            recipe.set(path, real(value))

    return Rule(paths, carry)


def steps(path: str) -> Rule:
    """A list or `1000,757,522`; a last 0 is no step here."""

    def read(value: Any) -> list[int]:
        found = [integer(step) for step in listed(value)]
        return found[:-1] if found and found[-1] == 0 else found

    return to(path, read)


def beta(section: str, index: int) -> Rule:
    """One of an optimizer's two betas; the other one is their default, or is read too."""
    path = f"{section}.optimizer.betas"

    def carry(recipe: Recipe, value: Any) -> None:
        betas = list(recipe.get(path) or [0.0, 0.999])
        betas[index] = real(value)
        recipe.set(path, betas)

    return Rule((path,), carry)


def betas(section: str) -> Rule:
    """`0.9,0.999` or a list."""

    def read(value: Any) -> list[float]:
        pair = [real(part) for part in listed(value)]
        if len(pair) != 2:
            raise ValueError("two numbers")
        return pair

    return to(f"{section}.optimizer.betas", read)


def _checkpointing(recipe: Recipe, value: Any) -> None:
    on = str(value).lower() in ("true", "full")
    if not on and str(value).lower() not in ("false", "none"):
        raise Untranslated("choose full or none, or set our checkpointing of each network afterwards")
    for name in ("student", "critic"):
        if recipe.get(name) is not None:
            recipe.set(f"{name}.checkpointing", "full" if on else "none")


checkpointing = Rule(("student.checkpointing", "critic.checkpointing"), _checkpointing)

_PRECISIONS = {"true": "bf16", "bf16": "bf16", "bfloat16": "bf16", "false": "fp32", "no": "fp32", "fp32": "fp32",
               "float32": "fp32"}  # fmt: skip


def _precision(value: Any) -> str:
    if str(value).lower() not in _PRECISIONS:
        raise Untranslated("passes are in bf16 or fp32 here")
    return _PRECISIONS[str(value).lower()]


precision = to("training.precision", _precision)


def one_of(path: str, known: dict[Any, Any], why: str = "") -> Rule:
    """Their word for each of ours; another word has no counterpart."""

    def read(value: Any) -> Any:
        if value not in known:
            raise Untranslated(f"only {', '.join(map(str, known))} can be carried over")
        return known[value]

    return to(path, read, why)


def must_be(*accepted: Any, why: str = "") -> Rule:
    """An option that has these values here, whatever a recipe says; others have no counterpart."""

    def carry(recipe: Recipe, value: Any) -> None:
        said = real(value) if isinstance(value, str) and isinstance(accepted[0], float) else value
        if not any(said == known and isinstance(said, bool) == isinstance(known, bool) for known in accepted):
            raise Untranslated(why or f"it is {accepted[0]} here, and nothing sets it")

    return Rule((), carry, why or f"it is {accepted[0]} here")


def refused(why: str) -> Rule:
    """An option that nothing here does, whatever its value. Null, false and an empty value ask for nothing."""

    def carry(recipe: Recipe, value: Any) -> None:
        if value not in (None, False, "", [], {}):
            raise Untranslated(why)

    return Rule((), carry, "it is off")


def later(what: str) -> Rule:
    """An option that asks for what a later version will support."""
    return refused(f"{what}: a later version will support it")


def harmless(why: str, *names: str) -> dict[str, Rule]:
    """Options that change nothing of the result. why: what they are for."""
    carry: Carry = lambda recipe, value: None  # noqa: E731
    return {name: Rule((), carry, why) for name in names}


LOGGING = "what is logged or stored, and where"
SPEED = "speed or memory alone"
VALIDATING = "what is sampled for the eye during training"
UNREAD = "their code reads it nowhere"


def student_updates(recipe: Recipe) -> None:
    """Iterations before the average begins are updates of the student here."""
    interval = recipe.get("training.generator_update_interval") or 1
    if (start := recipe.get("ema.start")) is not None and interval > 1:
        recipe.set("ema.start", math.ceil(start / interval))
        recipe.notes["ema.start"] = f"iteration {start} is the student's update {math.ceil(start / interval)}"
