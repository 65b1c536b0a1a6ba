"""Nothing of a recipe is lost in silence: an option is carried over, has no effect, or is refused, and all is told."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from importers.dialects import DIALECTS
from importers.read import flat
from importers.recipe import Dialect, Outcome, Recipe
from importers.report import leaves, table, to_text
from importers.rules import harmless, later, must_be, number, plus_one, refused, whole
from importers.translate import refusals, translate
from tests.importers.cases import (
    REFUSED,
    all_cases,
    base_of,
    cases,
    dialect_of,
    form_of,
    imported,
    options_of,
    recipe_of,
)

OF_COMMANDS = {"program", "config"}  # what a script says of a file
EMPTY = {"callbacks.ema", "callbacks.grad_clip"}  # sections, as options where nothing stands in them
# tables of the same options as another one's, whose recipe has each
BESIDE = {"fastvideo, causal students", "fastvideo, --config", "fastvideo, --config, causal students"}
RULES = {
    "rate": number("generator_training.optimizer.lr"),
    "guide": plus_one("objective.real_guidance_scale"),
    "steps": whole("training.max_steps"),
    "kept": must_be(1000),
    "eight_bit": later("an 8-bit base"),
    "magic": refused("nothing here does magic"),
    **harmless("what is logged", "log.*"),
}
DEFAULTS = {"guide": 3.0}


def nothing(recipe: Recipe) -> None:
    """A dialect without a last step."""


DIALECT = Dialect("test", RULES, DEFAULTS, {"trainer": "score_distillation"}, nothing)


def translated(*allow: str, **options: Any) -> Recipe:
    return translate(DIALECT, {name.replace("__", "."): value for name, value in options.items()}, allow)


def test_every_option_has_an_outcome() -> None:
    recipe = translated(rate="1e-5", kept=1000, log__where="x", log__wandb_key="hunter2", magic=False)
    assert refusals(recipe) == []
    assert {line.option: line.outcome for line in recipe.lines} == {
        "rate": Outcome.carried, "kept": Outcome.same, "log.where": Outcome.same, "log.wandb_key": Outcome.same,
        "magic": Outcome.same, "guide": Outcome.carried,
    }  # fmt: skip
    assert recipe.get("generator_training.optimizer.lr") == 1e-5  # YAML has it as text
    assert recipe.get("objective.real_guidance_scale") == 4.0  # their default, by the same rule
    assert [line.option for line in recipe.lines if line.is_default] == ["guide"]
    assert "# Not in the file, and as its code has it then:\n#   guide: 3.0\n" in to_text(recipe, "x")
    for text in (table(recipe), to_text(recipe, "x")):
        assert "hunter2" not in text


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("unheard_of", 7, "unheard_of: 7: it is not known here"),
        ("kept", 500, "kept: 500: it is 1000 here, and nothing sets it"),
        ("eight_bit", "int8", "eight_bit: 'int8': an 8-bit base: a later version will support it"),
        ("magic", True, "magic: True: nothing here does magic"),
        ("steps", 2.5, "steps: 2.5: this is not what it takes (a whole number)"),
        ("rate", "fast", "rate: 'fast': this is not what it takes"),
        ("rate", float("nan"), "rate: nan: this is not what it takes (a number)"),
        ("rate", True, "rate: True: this is not what it takes (a number)"),
        ("rate", [1], "rate: [1]: this is not what it takes"),
        ("rate", None, "rate: None: this is not what it takes"),
    ],
)
def test_what_is_not_understood_is_refused_and_may_be_left_out(option: str, value: Any, says: str) -> None:
    (problem,) = refusals(translated(**{option: value}))
    assert problem.startswith(says)
    recipe = translated(option, **{option: value})
    assert refusals(recipe) == []
    header = to_text(recipe, "x")
    assert f"# Left out, though it may change the result:\n#   {option}: " in header
    assert yaml.safe_load(header) == recipe.values


def test_all_refusals_are_told_at_once_and_a_slip_in_allow_is_one() -> None:
    told = refusals(translated("madgic", magic=True, unheard_of=1))
    assert [line.split(":")[0] for line in told] == ["magic", "unheard_of", "--allow madgic"]


def test_a_network_without_weights_is_refused() -> None:
    dialect = Dialect("test", RULES, {}, {"student": {"init": "a"}, "teacher": {"preset": "1.3b"}}, nothing)
    (problem,) = refusals(translate(dialect, {"rate": 1}, allow=()))
    assert problem.startswith("teacher: the file names no weights for it")


@pytest.mark.parametrize("files", [pytest.param(files, id=files[0].name) for files in cases()])
def test_the_table_has_every_option_and_every_key(files: tuple[Path, ...]) -> None:
    recipe, run = imported(dialect_of(files[0]), *files)
    text = table(recipe)
    left = [row.partition("  ")[0] for row in text.splitlines()]
    for line in recipe.lines:
        assert any(row.startswith(f"{line.option}: ") for row in left), line.option
    for key, _ in leaves(recipe.values):
        assert f"{key}: " in text
    assert run.data.kind == "wan"


FORMS = {form.name: form for dialect in DIALECTS.values() for form in (dialect, *dialect.forms)}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_whole(form: str) -> None:
    """Each option that it knows stands in a recipe of these tests, or among what is refused; so do its defaults."""
    known, dialect = {*REFUSED.get(form, {}), *OF_COMMANDS, *EMPTY}, FORMS[form]
    assert [option for option in dialect.defaults if dialect.rule(option) is None] == []
    for files in all_cases():
        options = options_of(*files)
        if form_of(dialect_of(files[0]), options).name.startswith(form) or form in BESIDE:
            known |= options.keys()
    if form not in BESIDE:
        unseen = {rule for rule in dialect.rules if not any(fnmatchcase(option, rule) for option in known)}
        assert sorted(unseen) == []


@pytest.mark.parametrize(
    ("form", "option"),
    [pytest.param(f, option, id=f"{f}: {option}") for f, found in REFUSED.items() for option in found],
)
def test_what_a_table_refuses(form: str, option: str) -> None:
    """By its name, also beside all that the recipe says; and no other option is refused for it."""
    dialect, options = base_of(form)
    value = REFUSED[form][option]
    options |= flat({option: value}) if isinstance(value, dict) else {option: value}
    told = refusals(recipe_of(dialect, options))
    assert any(line.startswith(option) for line in told), told


GARBAGE: tuple[Any, ...] = (None, "x", -1, 0, 2.5, 10**30, float("nan"), True, [], ["x", 1])


@pytest.mark.parametrize("files", [pytest.param(files, id=files[0].name) for files in all_cases()])
def test_no_value_is_an_error_of_ours(files: tuple[Path, ...]) -> None:
    """Whatever an option says, and whichever is left out, the options are carried over or refused, and all is told."""
    dialect, options = dialect_of(files[0]), options_of(*files)
    decisive = [name for name in options if (rule := form_of(dialect, options).rule(name)) is not None and rule.keys]
    for option in decisive:
        rest = {name: value for name, value in options.items() if name != option}
        for recipe in [recipe_of(dialect, rest), *(recipe_of(dialect, {**options, option: g}) for g in GARBAGE)]:
            assert all("\n" not in line for line in refusals(recipe))
