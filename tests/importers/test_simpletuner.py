"""SimpleTuner's DMD files: both of them, with and without dashes, and what of its quickstart a later version will do."""

from __future__ import annotations

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
    assert (run.ema.decay, run.ema.every) == (0.99, 5)
    assert (run.data.wan.frames, run.data.text.quantization.value) == (21, "int8")
    assert run.student.lora == LoraConfig(rank=128, alpha=64.0, targets=["q", "k", "v", "o"], share=True)
    assert run.critic is not None and run.critic.lora is None
    assert {"critic.lora", "objective.kind", "schedule.score_timestep_shift"} <= recipe.notes.keys()
    assert "training.global_batch_size" in recipe.missing  # it grows with the GPUs


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
    recipe = recipe_of("simpletuner", {"optimizer": "adamw", "learning_rate": 1e-4, "use_ema": True})
    assert refusals(recipe) == []
    get = recipe.get
    assert get("schedule.denoising_step_list") == [1000, 757, 522]
    assert (get("generator_training.optimizer.clip_value"), get("ema.decay")) == (2.0, 0.995)
    assert get("student.lora.rank") == 16  # a LoRA, where model_type is left out
    assert get("teacher.init") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    full = recipe_of("simpletuner", {"optimizer": "adamw", "learning_rate": 1e-4, "model_type": "full", "lora_rank": 4})
    assert full.get("student.lora") is None
