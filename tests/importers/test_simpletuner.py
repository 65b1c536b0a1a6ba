"""SimpleTuner's DMD files: both of them, with and without dashes, and what of its quickstart a later version will do."""

from __future__ import annotations

import pytest

from importers.read import read_options
from importers.translate import refusals
from model.network import LoraConfig
from tests.importers.cases import RECIPES, imported, recipe_of

CONFIG, BACKENDS = RECIPES / "simpletuner.json", RECIPES / "simpletuner_second.json"


def test_both_files() -> None:
    recipe, run = imported("simpletuner", CONFIG, BACKENDS)
    assert (run.objective.real_guidance_scale, run.objective.fake_guidance_scale) == (3.0, 1.0)  # w; its 0 is none
    student, critic = run.generator_training, run.critic_training
    assert (student.optimizer.lr, student.optimizer.clip_value, student.optimizer.clip_norm) == (2e-5, 0.5, None)
    assert (critic.optimizer.lr, critic.optimizer.clip_value, critic.optimizer.clip_norm) == (1e-5, None, 1.0)
    assert (student.lr_schedule.warmup_steps, critic.lr_schedule.warmup_steps) == (20, 0)  # of 100 iterations
    assert (run.training.generator_update_interval, run.training.critic_warmup_steps) == (5, 4)
    assert (run.schedule.timestep_shift, run.schedule.score_timestep_shift) == (5.0, 1.0)
    assert (run.schedule.min_score_timestep, run.schedule.max_score_timestep) == (20, 980)
    assert run.schedule.ts_schedule and run.rollout.same_step_across_blocks
    assert (run.ema.decay, run.ema.every) == (0.99, 1)  # each 5th iteration is an update
    assert (run.data.wan.frames, run.data.text.quantization.value) == (21, "int8")
    assert run.student.lora == LoraConfig(rank=128, alpha=64.0, targets=["q", "k", "v", "o"], share=True)
    assert run.critic is not None and run.critic.lora is None
    notes = {"critic.lora", "objective.kind", "objective.critic_loss", "schedule.denoising_step_list"}
    assert {*notes, "schedule.score_timestep_shift"} <= recipe.notes.keys()
    assert "training.global_batch_size" in recipe.missing  # it grows with the GPUs


def test_frames_are_those_of_its_videos() -> None:
    """Its rollout takes the shape of the batch; num_training_frames bounds nothing."""
    videos = "backend.videos.video.num_frames"
    changes = {videos: 105, "distillation_config.num_training_frames": 21}
    _, run = imported("simpletuner", CONFIG, BACKENDS, **changes)
    assert run.data.wan.frames == 27
    recipe, run = imported("simpletuner", CONFIG)
    assert run.data.wan.frames == 21 and "data.wan.frames" in recipe.missing
    options = read_options(CONFIG, BACKENDS)
    (problem,) = refusals(recipe_of("simpletuner", {**options, videos: 121}))
    assert problem.startswith(f"{videos}: 121: 31 latent frames are not whole blocks of 3")
    (problem,) = refusals(recipe_of("simpletuner", {**options, "backend.more.video.num_frames": 49}))
    assert problem.startswith("backend.more.video.num_frames: 49: other videos of it have 81 frames")


@pytest.mark.parametrize(
    ("every", "interval", "ours"),
    [(1, 5, (0.99**5, 1)), (5, 5, (0.99, 1)), (10, 5, (0.99, 2)), (2, 4, (0.99**2, 1)), (3, 1, (0.99, 3))],
)
def test_its_average_follows_iterations(every: int, interval: int, ours: tuple[float, int]) -> None:
    """The same average of a weight that only the student's updates change."""
    changes = {"ema_update_interval": every, "distillation_config.generator_update_interval": interval}
    _, run = imported("simpletuner", CONFIG, BACKENDS, **changes)
    assert run.ema.decay == pytest.approx(ours[0])
    assert run.ema.every == ours[1]
    theirs = mine = 0.0
    for iteration in range(1, 40 + interval):  # up to the student's next update
        update = iteration // interval
        theirs = 0.99 * theirs + 0.01 * update if iteration % every == 0 else theirs
    for update in range(1, 40 // interval + 1):
        mine = ours[0] * mine + (1 - ours[0]) * update if update % ours[1] == 0 else mine
    assert mine == pytest.approx(theirs)


def test_an_average_beside_the_updates_is_refused() -> None:
    options = {**read_options(CONFIG, BACKENDS), "ema_update_interval": 3}
    (problem,) = refusals(recipe_of("simpletuner", options))
    assert problem.startswith("ema_update_interval: 3: it falls on no whole number")


def test_what_the_quickstart_asks_of_a_later_version() -> None:
    """Its own file, by name: base weights in 8 bits, AdamW in bf16, and what is another's meaning here."""
    quickstart = {
        "optimizer": "adamw_bf16", "base_model_precision": "int8-quanto", "caption_dropout_probability": 0.1,
        "lr_scheduler": "cosine_with_min_lr", "learning_rate": 2e-5,
    }  # fmt: skip
    told = {line.split(":")[0]: line for line in refusals(recipe_of("simpletuner", quickstart))}
    assert told.keys() == quickstart.keys() - {"learning_rate"}
    assert "a later version will support it" in told["optimizer"]
    assert "a later version will support it" in told["base_model_precision"]


def test_its_defaults() -> None:
    recipe = recipe_of("simpletuner", {"optimizer": "torch-adamw", "learning_rate": 1e-4, "use_ema": True})
    assert refusals(recipe) == []
    get = recipe.get
    assert get("schedule.denoising_step_list") == [1000, 757, 522]
    assert (get("generator_training.optimizer.clip_value"), get("ema.decay")) == (2.0, 0.995)
    assert get("student.lora") is None and get("training.micro_batch_size") == 4
    assert get("generator_training.optimizer.betas") == [0.9, 0.999]
    assert get("teacher.init") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    adapter = {"optimizer": "torch-adamw", "learning_rate": 1e-4, "model_type": "lora"}
    assert recipe_of("simpletuner", adapter).get("student.lora.rank") == 16
    for name in ("adamw", "optimi-lion"):
        (problem,) = refusals(recipe_of("simpletuner", {**adapter, "optimizer": name}))
        assert problem.startswith(f"optimizer: '{name}': AdamW alone is ours; its name of ours is torch-adamw")
    assert refusals(recipe_of("simpletuner", {"learning_rate": 1e-4})) != []  # its code needs an optimizer
