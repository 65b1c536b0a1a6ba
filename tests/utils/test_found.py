"""What a script or a notebook registers is chosen like what the code has, and cannot take its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from configs.load import load_run
from model import family
from model.edm.family import EDMFamily
from model.objective import Objective, ObjectiveConfig, objectives, register
from tasks import data
from tasks.data import DataConfig
from tests import ROOT
from utils.found import Registry
from utils.optim import optimizers

TOY = ROOT / "configs/toy/self_forcing_dmd.yaml"


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    from model import objective

    for registry in (objective._REGISTRY, data._REGISTRY):
        monkeypatch.setattr(registry, "_added", dict(registry._added))
    monkeypatch.setattr(family, "_REGISTERED", dict(family._REGISTERED))


def test_a_registered_objective_is_chosen_by_its_kind_and_a_cell_may_run_again() -> None:
    @dataclass
    class OwnConfig(ObjectiveConfig):
        kind: str = "own"
        strength: float = 1.0

    for _ in range(2):

        @register
        class Own(Objective):
            kind = "own"
            config_type = OwnConfig

        assert objectives()["own"] is Own
    run = load_run(TOY, ["objective.kind=own", "objective.strength=2"])
    assert isinstance(run.objective, OwnConfig)
    assert run.objective.strength == 2.0
    assert next(iter(objectives())) == "dmd"


def test_what_cannot_be_registered_is_refused() -> None:
    @dataclass
    class DMDConfig(ObjectiveConfig):
        kind: str = "dmd"

    class DMD(Objective):
        kind = "dmd"
        config_type = DMDConfig

    with pytest.raises(ValueError, match=r"DMD: kind 'dmd' is taken, see model\.objectives: choose another name"):
        register(DMD)

    class Other(Objective):
        kind = "other"
        config_type = DMDConfig

    with pytest.raises(ValueError, match="Other: config_type must be .* with the kind 'other'"):
        register(Other)

    class NoDataclass(DataConfig):
        kind = "mine"

    with pytest.raises(ValueError, match="NoDataclass is no dataclass: put @register above @dataclass"):
        data.register(NoDataclass)
    with pytest.raises(ValueError, match="kind is 'a b': give it a name of letters"):
        data._REGISTRY.add(type("Mine", (DataConfig,), {"kind": "a b"}))
    with pytest.raises(ValueError, match="derive a class from Objective"):
        Registry("model.objectives", Objective, "dmd").add(int)  # type: ignore[arg-type]
    assert "other" not in objectives()
    assert next(iter(optimizers())) == "adamw"


def test_a_family_may_not_take_a_name_or_a_preset() -> None:
    class Own(EDMFamily):
        presets: ClassVar = {"own-digits": EDMFamily.presets["edm-digits"]}

    family.register("own", Own())
    family.register("own", mine := Own())
    assert family.families()["own"] is mine
    assert family.family_of("own-digits") is mine
    for name, presets, message in (
        ("edm", Own.presets, "family 'edm' is taken, see model/edm"),
        ("second", EDMFamily.presets, "family 'second': preset 'edm-digits' is edm's"),
        ("second", Own.presets, "family 'second': preset 'own-digits' is own's"),
        ("second", {}, "family 'second' has no preset"),
    ):
        with pytest.raises(ValueError, match=message):
            family.register(name, type("Second", (Own,), {"presets": presets})())
    with pytest.raises(ValueError, match="family 'second': preset 'own-digits' is first's: choose another name"):
        family.check_presets({"first": mine, "second": Own()})  # as of two folders
