"""The section `objective`: its kind decides which keys it has, in YAMLs, on the command line, in saved runs and in Python."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.load import checked, load_run, run_from_plain, run_from_state
from model.objective import Objective, ObjectiveConfig, Role, objectives
from model.objectives.dmd import DMDConfig
from tests import ROOT
from utils.config import to_plain
from utils.errors import ConfigError
from utils.optim import LRScheduleConfig, OptimizerConfig

TOY, DIGITS = ROOT / "configs/toy/self_forcing_dmd.yaml", ROOT / "configs/digits/f_distill.yaml"


def test_every_kind_has_one_file_and_the_default_is_the_first() -> None:
    files = {path.stem for path in (ROOT / "model/objectives").glob("*.py")} - {"__init__"}
    assert set(objectives()) == files
    assert next(iter(objectives())) == "dmd"
    assert all(kind == config().kind for kind, config in ObjectiveConfig.variants().items() if not config.needs_gan)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=[dmd]", "objective.kind: ['dmd'] is not allowed: did you mean 'dmd'?"),
        ("objective.kind={a: b}", "objective.kind: {'a': 'b'} is not allowed: give one of dmd, "),
        ("objective.kind=${name}", "the kind decides which keys there are: write it out"),
        ("objective.sid_alpha=0.5", "sid_alpha is not for kind dmd: leave it out, or choose sid"),
        ("objective={f_distill: {bin_momentum: 0.1}}", "f_distill is not for kind dmd: leave it out"),
    ],
)
def test_what_cannot_be_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_run(TOY, [override])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_later_layer_may_change_the_kind() -> None:
    """What the other kind's section says at its defaults, in part or as null, is left behind."""
    assert load_run(DIGITS, ["objective.kind=dmd"]).objective.kind == "dmd"  # the file says f_distill: {divergence: kl}
    assert load_run(DIGITS, ["objective.kind=dmd", "objective.f_distill=null"]).objective.kind == "dmd"
    run = load_run(TOY, ["objective.sid_alpha=0.5", "objective.kind=sid"])
    assert run.objective.sid_alpha == 0.5  # type: ignore[attr-defined]


def test_runs_saved_with_keys_that_did_nothing_are_read() -> None:
    values = to_plain(load_run(TOY))
    values["objective"] |= {"sid_alpha": 0.5, "ladd_mean": 1.0, "f_distill": {"divergence": "js", "bin_momentum": None}}
    assert run_from_state(values).objective == load_run(TOY).objective
    with pytest.raises(ConfigError, match="is not for kind dmd"):
        run_from_plain(values)


def test_configs_made_in_python_are_checked_too() -> None:
    run = load_run(TOY)
    with pytest.raises(ConfigError, match="a DMDConfig is no config of kind sid"):
        other = replace(run.objective)
        other.kind = "sid"
        checked(replace(run, objective=other))
    with pytest.raises(ValueError, match="kind 'moun' is unknown: choose adamw, muon"):
        OptimizerConfig(kind="moun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind 'linaer' is unknown: choose constant, linear, cosine"):
        LRScheduleConfig(kind="linaer")  # type: ignore[arg-type]


def test_an_objective_of_one_score_is_refused_when_it_is_written() -> None:
    with pytest.raises(TypeError, match="TeacherAlone.roles: one score has nothing to be compared with"):

        class TeacherAlone(Objective):
            roles = frozenset({Role.teacher})


def test_an_objective_of_another_kind_than_its_class_is_refused_when_it_is_made() -> None:
    for make, message in (
        (lambda: DMDConfig(kind="sid"), "a DMDConfig is no config of kind sid: choose SiDConfig"),
        (lambda: DMDConfig(kind="dmmd"), "kind 'dmmd' is unknown: choose dmd"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
