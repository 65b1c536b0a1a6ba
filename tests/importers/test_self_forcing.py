"""Self-Forcing and what grew out of it: the published run is our recipe of it, and what an absent option means."""

from __future__ import annotations

import pytest

from configs.load import load_run
from importers.read import read_options
from importers.translate import refusals
from tests import ROOT
from tests.importers.cases import RECIPES, REFUSED_RECIPES, imported, recipe_of

FILE, LONGLIVE, CAUSVID = (RECIPES / f"{name}.yaml" for name in ("self_forcing", "longlive", "causvid"))


@pytest.mark.parametrize("dialect", ["self_forcing", "causal_forcing"])
def test_the_published_run_is_our_recipe_of_it(dialect: str) -> None:
    """The same guidance, steps, rates, average."""
    _, run = imported(dialect, RECIPES / f"{dialect}.yaml")
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
    assert run.training.global_batch_size == 64
    assert run.validation.fps == ours.validation.fps


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


def test_real_guidance_counts_before_guidance() -> None:
    both = {"guidance_scale": 3.0, "real_guidance_scale": 5.0, "fake_guidance_scale": 1.0}
    recipe = recipe_of("self_forcing", {"lr": 1e-6, **both})
    assert (recipe.get("objective.real_guidance_scale"), recipe.get("objective.fake_guidance_scale")) == (6.0, 2.0)
    recipe = recipe_of("self_forcing", {"lr": 1e-6, "guidance_scale": 3.0})
    assert (recipe.get("objective.real_guidance_scale"), recipe.get("objective.fake_guidance_scale")) == (4.0, None)


def test_the_least_score_timestep_is_drawn_before_the_shift() -> None:
    """20 of 1000, shifted by 5: the level that ours bounds."""
    _, run = imported("longlive", LONGLIVE)
    assert run.schedule.min_score_timestep == pytest.approx(1000 * 5 * 0.02 / (1 + 4 * 0.02))


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
    _, run = imported("causvid", CAUSVID, backward_simulation=False)
    assert (run.rollout.kind, run.data.real, run.data.latents) == ("noised_data", True, "prompts/mixkit.txt")


def test_its_published_causal_recipe_is_refused_by_name() -> None:
    options = {**read_options(CAUSVID), "generator_name": "causal_wan", "generator_task": "causal_video"}
    options |= {"denoising_step_list": [1000, 757, 522, 0], "backward_simulation": False}
    del options["generator_task_type"]
    told = {line.split(":")[0] for line in refusals(recipe_of("causvid", options))}
    assert told == {"generator_name", "generator_task", "denoising_step_list"}
