"""Rules that several tables of `importers/tables.py` share. Each is a rule of one option, or makes one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from importers.data import preset_of
from importers.recipe import Recipe, Untranslated


def network(name: str) -> Callable[[Recipe, Any], None]:
    """A model's name or path: the geometry by the size in it, the weights by itself."""

    def rule(recipe: Recipe, value: Any) -> None:
        recipe.set(f"{name}.init", str(value))
        if (size := preset_of(str(value))) is not None:
            recipe.set(f"{name}.preset", size)
        else:
            recipe.fill(f"{name}.preset", f"the size is not in the name '{value}': check what was put")

    return rule


def spread_base(recipe: Recipe) -> None:
    """Gives `base`, the model of all networks, to the networks whose model no option names."""
    base = recipe.get("base")
    size = preset_of(base or "")
    if size is None:
        recipe.fill("student.preset", f"the size is not in the name '{base}': check what was put")
    for name in ("student", "teacher", "critic"):
        if recipe.get(f"{name}.preset") is None:
            recipe.set(f"{name}.preset", size or "1.3b")
        if recipe.get(f"{name}.init") is None and base is not None:
            recipe.set(f"{name}.init", base)


def text(path: str) -> Callable[[Recipe, Any], None]:
    return lambda recipe, value: recipe.set(path, str(value))


def weights(path: str) -> Callable[[Recipe, Any], None]:
    return lambda recipe, value: recipe.set(f"{path}.init", str(value))


def plus_one(path: str) -> Callable[[Recipe, Any], None]:
    return lambda recipe, value: recipe.set(path, float(value) + 1)


def both(key: str) -> Callable[[Recipe, Any], None]:
    def rule(recipe: Recipe, value: Any) -> None:
        for section in ("generator_training", "critic_training"):
            recipe.set(f"{section}.optimizer.{key}", float(value))

    return rule


def number(path: str) -> Callable[[Recipe, Any], None]:
    return lambda recipe, value: recipe.set(path, float(value))


def whole(path: str) -> Callable[[Recipe, Any], None]:
    return lambda recipe, value: recipe.set(path, int(value))


def flag(path: str) -> Callable[[Recipe, Any], None]:
    def rule(recipe: Recipe, value: Any) -> None:
        if str(value).lower() not in ("true", "false"):
            raise ValueError("true or false")
        recipe.set(path, str(value).lower() == "true")

    return rule


def steps(path: str) -> Callable[[Recipe, Any], None]:
    """A list or `1000,757,522`; a last 0 is no step here."""

    def rule(recipe: Recipe, value: Any) -> None:
        listed = [int(step) for step in (value.split(",") if isinstance(value, str) else value)]
        recipe.set(path, listed[:-1] if listed and listed[-1] == 0 else listed)

    return rule


def beta(section: str, index: int) -> Callable[[Recipe, Any], None]:
    def rule(recipe: Recipe, value: Any) -> None:
        path = f"{section}.optimizer.betas"
        betas = list(recipe.get(path) or [0.0, 0.999])
        betas[index] = float(value)
        recipe.set(path, betas)

    return rule


def betas(*sections: str) -> Callable[[Recipe, Any], None]:
    def rule(recipe: Recipe, value: Any) -> None:
        pair = [float(part) for part in (value.split(",") if isinstance(value, str) else value)]
        for section in sections:
            recipe.set(f"{section}.optimizer.betas", list(pair))

    return rule


def checkpointing(recipe: Recipe, value: Any) -> None:
    on = str(value).lower() in ("true", "full")
    if not on and str(value).lower() != "false":
        raise Untranslated("choose none, full or selective for each network's checkpointing")
    for name in ("student", "critic"):
        recipe.set(f"{name}.checkpointing", "full" if on else "none")


def precision(recipe: Recipe, value: Any) -> None:
    known = {"true": "bf16", "bf16": "bf16", "false": "fp32", "no": "fp32", "fp32": "fp32"}
    if str(value).lower() not in known:
        raise Untranslated("choose bf16 or fp32 for training.precision")
    recipe.set("training.precision", known[str(value).lower()])


def one_of(path: str, known: dict[str, Any]) -> Callable[[Recipe, Any], None]:
    def rule(recipe: Recipe, value: Any) -> None:
        if str(value) not in known:
            raise Untranslated(f"there is none of this here: {path} is one of {', '.join(map(str, known.values()))}")
        recipe.set(path, known[str(value)])

    return rule


def must_be(*accepted: Any) -> Callable[[Recipe, Any], None]:
    """An option that has a fixed value here; other values have no counterpart."""

    def rule(recipe: Recipe, value: Any) -> None:
        if value not in accepted:
            raise Untranslated(f"it is {accepted[0]} here")

    return rule


def shape(recipe: Recipe, value: Any) -> None:
    """[B, F, C, H, W] of latents."""
    _, frames, _, height, width = value
    recipe.set("size", {"frames": int(frames), "height": int(height), "width": int(width)})


def critic_learns_ode(recipe: Recipe, value: Any) -> None:
    if value != "score_distillation":
        raise Untranslated("this table is of its score_distillation trainer")


def finish_updates(recipe: Recipe) -> None:
    """Iterations before the average begins are updates of the student here; the critic takes the student's defaults."""
    interval = recipe.get("training.generator_update_interval") or 1
    if (start := recipe.get("ema.start")) is not None:
        recipe.set("ema.start", math.ceil(start / interval))
    student = recipe.get("generator_training.optimizer") or {}
    critic = recipe.get("critic_training.optimizer") or {}
    recipe.set("critic_training.optimizer", {**student, **critic})
    if recipe.get("ema.enabled") is False:
        recipe.set("ema.decay", None)
    recipe.values.get("ema", {}).pop("enabled", None)
