"""Self-Forcing and what grew out of it: the published run is our recipe of it, and what an absent option means."""

from __future__ import annotations

from typing import Any

import pytest

from configs.load import load_run
from configs.rollout import SelfForcingConfig
from importers.read import read_options
from importers.translate import refusals
from tests import ROOT
from tests.importers.cases import RECIPES, REFUSED_RECIPES, imported, recipe_of

FILE, LONGLIVE, CAUSVID = (RECIPES / f"{name}.yaml" for name in ("self_forcing", "longlive", "causvid"))


@pytest.mark.parametrize("dialect", ["self_forcing", "causal_forcing"])
def test_the_published_run_is_our_recipe_of_it(dialect: str) -> None:
    """The same guidance, steps, rates, average."""
    recipe, run = imported(dialect, RECIPES / f"{dialect}.yaml")
    ours = load_run(ROOT / "configs/wan2.1_1.3b/self_forcing_dmd.yaml")
    assert run.schedule == ours.schedule
    assert run.objective == ours.objective
    assert run.ema == ours.ema
    assert run.generator_training == ours.generator_training
    assert run.critic_training == ours.critic_training
    assert run.data.wan == ours.data.wan
    assert run.rollout == ours.rollout
    assert run.teacher is not None and run.critic is not None
    assert (run.student.preset, run.teacher.preset, run.critic.preset) == ("1.3b", "14b", "1.3b")
    assert run.student.init == "checkpoints/ode_init.pt"
    assert (run.data.prompts, run.data.real) == ("prompts/vidprom.txt", False)
    assert run.causal.num_frame_per_block == (3 if dialect == "self_forcing" else 1)
    if dialect == "self_forcing":  # Causal-Forcing's files say 8 where its published runs have 64, and read neither
        assert run.training.global_batch_size == 64
    assert run.validation.fps == ours.validation.fps
    assert ("training.global_batch_size" in recipe.missing) is (dialect == "causal_forcing")


def test_what_a_file_leaves_out() -> None:
    """The values of its code, and the networks that it then loads."""
    recipe = recipe_of("self_forcing", {"lr": 1e-6, "denoising_step_list": [1000], "guidance_scale": 3.0})
    assert refusals(recipe) == []
    get = recipe.get
    assert get("schedule.ts_schedule") is True
    assert get("schedule.warp_denoising_step") is False
    assert (get("schedule.score_timestep_shift"), get("schedule.timestep_shift")) == (1.0, 8.0)
    for network in ("student", "teacher", "critic"):
        assert get(f"{network}.init") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert get("critic_training.optimizer.lr") == 1e-6
    assert get("generator_training.optimizer.clip_norm") == 10.0
    assert get("causal.num_frame_per_block") == 1
    assert {"training.global_batch_size", "training.max_steps", "data.prompts"} <= recipe.missing.keys()
    # what its code has no default for, so no value of ours passes for theirs
    assert {"ema.decay", "ema.start", "training.generator_update_interval", "objective.kind"} <= recipe.missing.keys()
    assert "objective.real_guidance_scale" not in recipe.missing
    assert "objective.real_guidance_scale" in recipe_of("self_forcing", {"lr": 1e-6}).missing


def test_real_guidance_counts_before_guidance() -> None:
    both = {"guidance_scale": 3.0, "real_guidance_scale": 5.0, "fake_guidance_scale": 1.0}
    recipe = recipe_of("self_forcing", {"lr": 1e-6, **both})
    assert (recipe.get("objective.real_guidance_scale"), recipe.get("objective.fake_guidance_scale")) == (6.0, 2.0)
    recipe = recipe_of("self_forcing", {"lr": 1e-6, "guidance_scale": 3.0})
    assert (recipe.get("objective.real_guidance_scale"), recipe.get("objective.fake_guidance_scale")) == (4.0, None)
    recipe = recipe_of("self_forcing", {"lr": 1e-6, "guidance_scale": 3.0, "fake_guidance_scale": 1.0})
    assert recipe.get("objective.fake_guidance_scale") == 1.0  # conditional alone, whatever the file says


def test_the_least_score_timestep_is_drawn_before_the_shift() -> None:
    """20 of 1000, shifted by 5: the level that ours bounds."""
    _, run = imported("longlive", LONGLIVE)
    assert run.schedule.min_score_timestep == pytest.approx(1000 * 5 * 0.02 / (1 + 4 * 0.02))


def test_bounds_by_exit_steps() -> None:
    """Theirs lie before the score's shift, on the student's grid: step 500 of shift 8 is 111, which 5 shifts to 385."""
    _, run = imported("self_forcing", FILE, ts_schedule=True)
    assert run.schedule.ts_schedule is True
    apart = {**read_options(FILE), "ts_schedule": True, "timestep_shift": 3.0}
    (problem,) = refusals(recipe_of("self_forcing", apart))
    assert problem.startswith("ts_schedule: True: its bound is a step's level")
    left_out = {name: value for name, value in apart.items() if name != "ts_schedule"}  # true in its code
    assert [line.split(":")[0] for line in refusals(recipe_of("self_forcing", left_out))] == ["ts_schedule"]
    _, run = imported("self_forcing", FILE, ts_schedule=True, same_step_across_blocks=False)
    assert (run.schedule.ts_schedule, run.rollout) == (False, SelfForcingConfig(same_step_across_blocks=False))


def test_causal_forcings_stages_before_its_dmd_are_named() -> None:
    for stage, ours in (("diffusion", "diffusion"), ("ode", "ode"), ("consistency_distillation", "consistency")):
        told = refusals(
            recipe_of("causal_forcing", {**read_options(RECIPES / "causal_forcing.yaml"), "trainer": stage})
        )
        assert len(told) == 1 and told[0].endswith(f"with trainer {ours}")


def test_longlives_adapter_section() -> None:
    """It makes adapters whatever it says: of rank 16, and alpha is the rank."""
    options = {name: value for name, value in read_options(LONGLIVE).items() if not name.startswith("adapter")}
    for section, found in (
        ({"adapter.type": "lora"}, (16, 16.0)),
        ({"adapter.rank": 256, "adapter.alpha": 0}, (256, 256.0)),
        ({"adapter.rank": 8}, (8, 8.0)),
    ):
        lora = recipe_of("longlive", {**options, **section}).get("student.lora")
        assert (lora["rank"], lora["alpha"]) == found
    assert recipe_of("longlive", options).get("student.lora") is None


def test_longlives_batch_and_length_are_not_what_a_naive_reading_finds() -> None:
    recipe, run = imported("longlive", LONGLIVE)
    assert recipe.missing["training.global_batch_size"].startswith("GPUs times batch_size times 2")
    assert recipe.get("training.global_batch_size") is None  # total_batch_size is read nowhere
    assert "critic" in recipe.notes["critic.init"]  # generator_ckpt may hold one
    options = read_options(LONGLIVE)
    del options["max_iters"]
    assert recipe_of("longlive", options).get("training.max_steps") == 10001
    _, run = imported("longlive", LONGLIVE, max_checkpoints=0)
    assert run.checkpoint.keep_last == 10**6


def test_longlive() -> None:
    _, run = imported("longlive", LONGLIVE)
    assert (run.causal.window_frames, run.causal.sink_frames) == (12, 3)
    assert (run.data.wan.frames, run.rollout.num_training_frames) == (21, 27)
    assert (run.training.max_steps, run.checkpoint.keep_last) == (701, 3)
    assert run.objective.real_guidance_scale == 4.0
    lora = run.student.lora
    assert run.critic is not None and lora is not None and run.critic.lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (256, 128.0, ["q", "k", "v", "o", "ffn.0", "ffn.2"])
    options = {name: value for name, value in read_options(LONGLIVE).items() if not name.startswith("adapter")}
    plain = recipe_of("longlive", options)
    assert plain.get("student.lora") is None
    assert (run.ema.decay, plain.get("ema.decay")) == (None, 0.99)  # of adapters it keeps no average
    options = {**read_options(LONGLIVE), "adapter.apply_to_critic": False}
    assert recipe_of("longlive", options).get("critic.lora") is None


def test_longlive_2_is_shown_and_refused() -> None:
    recipe = recipe_of("longlive2", read_options(REFUSED_RECIPES / "longlive2.yaml"))
    (problem,) = refusals(recipe)
    assert problem.startswith("LongLive 2: its DMD normalises each block")
    assert recipe.get("objective.real_guidance_scale") == 4.0
    assert (recipe.get("student.preset"), recipe.get("data.wan")["frames"]) == ("5b", 32)


def test_causvid() -> None:
    recipe, run = imported("causvid", CAUSVID)
    assert run.objective.real_guidance_scale == 4.5
    assert (run.rollout.kind, run.data.prompts) == ("backward_simulation", "prompts/mixkit.txt")
    assert run.schedule.sigmas() == pytest.approx((1.0, 0.757, 0.522))
    assert run.schedule.score_timestep_shift == 8.0
    student, critic = run.generator_training.optimizer, run.critic_training.optimizer
    assert student == critic  # one rate, one pair of betas
    assert (student.lr, student.betas, student.clip_norm) == (2e-6, [0.9, 0.999], 10.0)
    assert run.ema.decay is None
    assert "training.global_batch_size" in recipe.missing
    assert run.schedule.timestep_shift == 8.0
    _, run = imported("causvid", CAUSVID, backward_simulation=False)
    assert (run.rollout.kind, run.data.real, run.data.latents) == ("noised_data", True, "prompts/mixkit.txt")


def test_causvids_causal_student() -> None:
    """Noised videos, a level for each block: 2.0 is w = 3, and its steps are always shifted by 8."""
    _, run = imported("causvid", RECIPES / "causvid_causal.yaml")
    assert (run.rollout.kind, run.causal.num_frame_per_block) == ("diffusion_forcing", 3)
    assert (run.data.real, run.data.latents, run.data.prompts) == (True, "mixkit_latents_lmdb", None)
    assert run.objective.real_guidance_scale == 3.0
    assert run.schedule.sigmas() == pytest.approx((1.0, 24 / 25, 8 / 9, 8 / 11))
    assert run.ema.decay is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"denoising_step_list": [1000, 757, 522, 0]}, "denoising_step_list"),  # as published
        ({"backward_simulation": True}, "backward_simulation"),
        ({"generator_name": "wan"}, "generator_name"),
        ({"real_task_type": None}, "real_task_type"),
    ],
)
def test_causvids_causal_student_elsewise_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    options = {**read_options(RECIPES / "causvid_causal.yaml"), **changes}
    options = {name: value for name, value in options.items() if value is not None}  # None: left out
    assert [line.split(":")[0] for line in refusals(recipe_of("causvid", options))] == [told]
