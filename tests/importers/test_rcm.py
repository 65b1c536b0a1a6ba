"""rCM's command lines are read, shown beside ours, and refused, for no run here does what they ask."""

from __future__ import annotations

from importers.read import read_options
from importers.report import table
from importers.translate import refusals
from tests.importers.cases import REFUSED_RECIPES, recipe_of


def test_its_options_are_shown_and_its_method_is_refused() -> None:
    recipe = recipe_of("rcm", read_options(REFUSED_RECIPES / "rcm.sh"))
    (problem,) = refusals(recipe)
    assert problem.startswith("wan2pt1_1pt3B_res480p_t2v_rCM: its consistency loss (sCM)")
    get = recipe.get
    assert get("objective.real_guidance_scale") == 6.0  # its 5 is added to the conditional
    assert (get("generator_training.optimizer.lr"), get("critic_training.optimizer.lr")) == (2e-6, 4e-7)
    assert (get("training.generator_update_interval"), get("data.wan.frames")) == (10, 20)
    assert get("training.update_schedule") == "alternating"
    assert get("student.preset") == get("teacher.preset") == get("critic.preset") == "14b"
    assert get("generator_training.optimizer.clip_norm") is None
    assert "a-secret" not in table(recipe)


def test_an_experiment_brings_its_own_rates() -> None:
    recipe = recipe_of("rcm", {"experiment": "wan2pt1_14B_res480p_t2v_rCM"})
    get = recipe.get
    assert (get("generator_training.optimizer.lr"), get("critic_training.optimizer.lr")) == (1e-6, 1e-7)
    assert get("student.preset") == "14b"
    assert get("training.generator_update_interval") == 10


def test_a_word_counts_before_the_experiment_wherever_it_stands() -> None:
    recipe = recipe_of("rcm", {"optimizer.lr": 3e-6, "experiment": "wan2pt1_14B_res480p_t2v_rCM"})
    assert recipe.get("generator_training.optimizer.lr") == 3e-6
    assert recipe.get("critic_training.optimizer.lr") == 1e-7
