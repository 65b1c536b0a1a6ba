"""`preprocess.py ode`: exactly the trajectories that the trainer makes itself, in files that jobs share out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from generation.ode_pairs import preprocess_ode
from tests.small import DISTILLATION, ODE, config, merged, save_networks, trainer, with_weights
from utils.config import save
from utils.data.safetensors_shards import SafetensorsFolder
from utils.errors import ConfigError, UserError

PAIRS = {"ode": {"pairs": 5, "steps": 6}}


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    save_networks(tmp_path / "start")
    base = with_weights(ODE, tmp_path / "start")
    save(config(base, **PAIRS), tmp_path / "ode.yaml")
    return tmp_path / "ode.yaml", base


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_the_files_hold_what_the_trainer_makes(
    recipe: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], causal: bool
) -> None:
    path, base = recipe
    base = merged(base, {"ode": {"causal_teacher": causal}})
    save(config(base, **PAIRS), path)
    run = trainer(tmp_path / "run", base, **PAIRS)
    (stored,) = (load_file(file) for file in (tmp_path / "run").glob("ode_pairs_*.safetensors"))
    out = tmp_path / "out"
    how = ["--config_path", str(path), "--out", str(out), "--rows", "2"]
    assert preprocess_ode([*how, "--share", "1/2"]) == 0
    assert [file.name for file in out.iterdir()] == ["ode_00001_of_00003.safetensors"]
    assert preprocess_ode(how) == 0
    assert "2 files made, 1 were there" in capsys.readouterr().out
    folder = SafetensorsFolder(out)
    assert torch.equal(folder.sigmas, stored["sigma"])
    assert folder.sigmas[0] == 1
    assert folder.sigmas[-1] == 0
    for pair in range(5):
        sample = folder.read(pair, 0)
        assert torch.allclose(sample.trajectory, stored["x"][pair], rtol=1e-5, atol=1e-5)
        assert sample.caption == run.task.prompts(range(pair, pair + 1))[0]
    assert len({float(folder.read(pair, 0).latents.sum()) for pair in range(5)}) == 5


def test_another_job_or_recipe_is_refused_in_one_line(recipe: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = recipe
    how = ["--config_path", str(path), "--out", str(tmp_path / "out")]
    preprocess_ode([*how, "ode.pairs=2"])
    save(config(DISTILLATION), tmp_path / "dmd.yaml")
    for arguments, message in [
        ([*how, "ode.pairs=2", "ode.guidance=3.0"], "was made from other data or settings: give another --out"),
        ([*how, "--share", "2/2"], "share 2/2: give i/n"),
        ([*how, "--rows", "0"], "at least one sample and one row"),
        (["--config_path", str(tmp_path / "dmd.yaml"), "--out", "x"], "is no recipe of ODE initialisation"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            preprocess_ode(arguments)
        assert "\n" not in str(error.value)


def test_what_differs_from_the_making_is_named_and_the_student_left_alone(
    recipe: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Two steps of the teacher come near none of the student's levels; the remedy is the number of steps, not the list."""
    path, base = recipe
    out = tmp_path / "out"
    preprocess_ode(["--config_path", str(path), "--out", str(out), "ode.steps=2", "ode.pairs=1"])

    def read(**ode: object) -> None:
        trainer(tmp_path / "run", merged(base, {"ode": {"path": str(out), **ode}}))

    with pytest.raises(ConfigError) as error:
        read(steps=6)
    said = str(error.value)
    assert "stores the noise levels" in said
    assert "ode.steps is 2 there and 6 here: set these keys to what the trajectories were made with" in said
    assert "set that list" not in said
    assert "\n" not in said
    read(steps=2)
    with pytest.raises(ConfigError, match="ode.causal_teacher is false there and true here: set it"):
        read(steps=2, causal_teacher=True)
    with pytest.raises(UserError, match=r"delete this folder \(ode.steps is 2 there and 3 here\)"):
        preprocess_ode(["--config_path", str(path), "--out", str(out), "ode.steps=3", "ode.pairs=1"])
