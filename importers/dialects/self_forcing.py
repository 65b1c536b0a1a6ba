"""Self-Forcing (arXiv 2506.08009): its YAML over its `default_config.yaml`.

Its own trainer is the only one that is carried over. Guidance is cond + s (cond - uncond). A network whose name is left
out is Wan2.1's 1.3B, and `ts_schedule` is true where a file does not say it. Its bounds lie on the score's timestep
before the shift, so they are ours where both shifts are one.

Read in guandeh17/Self-Forcing, `model/dmd.py` at 42be74d7, and in copies of its `default_config.yaml`.
"""

from __future__ import annotations

from typing import Any

from importers.data import finish_data
from importers.networks import model, spread_base, weights
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    SPEED,
    STUDENT,
    UNREAD,
    VALIDATING,
    beta,
    both,
    checkpointing,
    count,
    flag,
    harmless,
    integer,
    must_be,
    number,
    one_of,
    plus_one,
    precision,
    real,
    stage,
    steps,
    student_updates,
    text,
    to,
    whole,
)

JUDGED = 21  # latent frames that its scores see, which no option changes
BASE = "Wan2.1-T2V-1.3B"


def shape(recipe: Recipe, value: Any) -> None:
    """[B, F, C, H, W] of latents, of which its code reads C, H and W."""
    _, frames, channels, height, width = map(integer, value)
    if (frames, channels) != (JUDGED, 16):
        raise Untranslated(f"its code rolls out and judges {JUDGED} frames of 16 channels whatever is written here")
    recipe.staged["size"] = {"frames": frames, "height": height, "width": width}


def training_frames(recipe: Recipe, value: Any) -> None:
    if integer(value) < JUDGED:
        raise Untranslated(f"its rollouts have at least {JUDGED} frames")
    recipe.set("rollout.num_training_frames", None if integer(value) == JUDGED else integer(value))


def window(recipe: Recipe, value: Any) -> None:
    recipe.set("causal.window_frames", None if integer(value) == -1 else integer(value))


def seed(recipe: Recipe, value: Any) -> None:
    recipe.set("seed", integer(value))
    if integer(value) == 0:
        recipe.notes["seed"] = "its 0 draws a seed anew for every run; here it is the number 0"


def flow(value: Any) -> str:
    if value != "flow":
        raise Untranslated("flow alone can run there: its other losses need a table that its scheduler does not have")
    return "flow"


# what every project that grew out of this code reads alike
SHARED: dict[str, Rule] = {
    "generator_ckpt": weights("student"),
    "real_name": model("teacher"),
    "fake_name": model("critic"),
    "denoising_step_list": steps("schedule.denoising_step_list"),
    "warp_denoising_step": flag("schedule.warp_denoising_step"),
    "ts_schedule": flag("schedule.ts_schedule"),
    "ts_schedule_max": flag("schedule.ts_schedule_max"),
    "min_score_timestep": stage("least_score", real, "schedule.min_score_timestep"),
    "num_train_timestep": must_be(1000),
    "timestep_shift": to("schedule.score_timestep_shift", lambda value: max(real(value), 1.0), "1 or less is none"),
    "model_kwargs.timestep_shift": number("schedule.timestep_shift"),
    "model_kwargs.local_attn_size": Rule(("causal.window_frames",), window),
    "model_kwargs.sink_size": whole("causal.sink_frames"),
    "guidance_scale": stage(
        "guidance", lambda value: value, "objective.real_guidance_scale", why="it counts without real_guidance_scale"
    ),
    "real_guidance_scale": plus_one("objective.real_guidance_scale"),
    "fake_guidance_scale": plus_one("objective.fake_guidance_scale"),
    "denoising_loss_type": to("objective.critic_loss", flow),
    "trainer": one_of("trainer", {"score_distillation": "score_distillation"}),
    "mixed_precision": precision,
    "seed": Rule(("seed",), seed),
    "lr": number(f"{STUDENT}.optimizer.lr"),
    "lr_critic": number(f"{CRITIC}.optimizer.lr"),
    "beta1": beta(STUDENT, 0),
    "beta2": beta(STUDENT, 1),
    "beta1_critic": beta(CRITIC, 0),
    "beta2_critic": beta(CRITIC, 1),
    "weight_decay": both("weight_decay"),
    "max_grad_norm_generator": number(f"{STUDENT}.optimizer.clip_norm"),
    "max_grad_norm_critic": number(f"{CRITIC}.optimizer.clip_norm"),
    "data_path": text("data.prompts"),
    "negative_prompt": text("data.negative_prompt"),
    "batch_size": count("training.micro_batch_size"),
    "total_batch_size": count("training.global_batch_size", "its code takes GPUs times batch_size, whatever it says"),
    "ema_weight": to("ema.decay", lambda value: float(value) or None),
    "ema_start_step": whole("ema.start"),
    "log_iters": count("checkpoint.every"),
    "dfake_gen_update_ratio": count("training.generator_update_interval"),
    "image_or_video_shape": Rule(("data.wan.frames", "data.wan.height", "data.wan.width"), shape),
    "gradient_checkpointing": checkpointing,
    "num_frame_per_block": count("causal.num_frame_per_block"),
    "independent_first_frame": flag("causal.independent_first_frame"),
    "context_noise": number("causal.context_noise"),
    "same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    "last_step_only": flag("rollout.last_step_only"),
    "num_training_frames": Rule(("rollout.num_training_frames",), training_frames),
    "load_raw_video": must_be(False),
    "causal": must_be(True),
    "i2v": must_be(False),
    "backward_simulation": must_be(True),
    **harmless(
        "of another stage's trainer", "teacher_forcing", "noise_augmentation_max_timestep", "max_pair",
    ),
    **harmless(
        LOGGING, "wandb*", "disable_wandb", "logdir", "config_name", "no_save", "no_visualize",
    ),
    **harmless(
        SPEED, "generator_fsdp_wrap_strategy", "real_score_fsdp_wrap_strategy", "fake_score_fsdp_wrap_strategy",
        "text_encoder_fsdp_wrap_strategy", "text_encoder_cpu_offload", "sharding_strategy", "gc_interval",
    ),
    **harmless(
        VALIDATING, "ckpt_step", "prompt_name", "prompt_path", "eval_first_n", "num_samples", "height", "width",
        "num_frames", "vis_interval", "val_data_path",
    ),
    **harmless(UNREAD, "discriminator_lr_multiplier"),
}  # fmt: skip

# options without a default in its code, and our key of each
REQUIRED = {
    "objective.kind": "distribution_loss", "objective.critic_loss": "denoising_loss_type",
    "objective.real_guidance_scale": "guidance_scale", "schedule.denoising_step_list": "denoising_step_list",
    f"{STUDENT}.optimizer.lr": "lr", "ema.decay": "ema_weight", "ema.start": "ema_start_step",
    "training.generator_update_interval": "dfake_gen_update_ratio", "training.precision": "mixed_precision",
}  # fmt: skip
SHARED_DEFAULTS = {
    "real_name": BASE, "fake_name": BASE, "warp_denoising_step": False, "ts_schedule": True, "ts_schedule_max": False,
    "min_score_timestep": 0, "timestep_shift": 1.0, "model_kwargs.timestep_shift": 8.0, "seed": 0,
    "beta1": 0.0, "beta2": 0.999, "beta1_critic": 0.0, "beta2_critic": 0.999, "weight_decay": 0.01,
    "max_grad_norm_generator": 10.0, "max_grad_norm_critic": 10.0, "num_frame_per_block": 1,
    "independent_first_frame": False, "context_noise": 0, "same_step_across_blocks": True, "last_step_only": False,
    "num_training_frames": JUDGED, "batch_size": 1,
}  # fmt: skip

RULES: dict[str, Rule] = {
    **SHARED,
    "model_kwargs.model_name": model("student"),
    "distribution_loss": one_of("objective.kind", {"dmd": "dmd", "sid": "sid"}),
    "sid_alpha": number("objective.sid_alpha"),
}


def finish(recipe: Recipe) -> None:
    """The parts that all dialects of this ancestry share."""
    require(recipe)
    guide(recipe)
    exit_bounds(recipe)
    bound(recipe)
    spread_base(recipe, BASE)
    if (rate := recipe.get(f"{STUDENT}.optimizer.lr")) is not None and recipe.get(f"{CRITIC}.optimizer.lr") is None:
        recipe.set(f"{CRITIC}.optimizer.lr", rate)
    if recipe.get("objective.kind") != "sid":
        recipe.drop("objective.sid_alpha")
    put_batch(recipe)
    finish_data(recipe)
    student_updates(recipe)


def require(recipe: Recipe) -> None:
    """What its code has no default for is to be filled in, where the file leaves it out."""
    said = {line.option for line in recipe.lines} | ({"guidance_scale"} if "guidance" in recipe.staged else set())
    said |= {"guidance_scale"} if "real_guidance_scale" in said else set()
    for key, option in REQUIRED.items():
        if option not in said:
            recipe.missing[key] = f"the file leaves {option} out, and its code has no default"
    if recipe.get("ema.start") == 0 and recipe.get("ema.decay") is not None:
        recipe.notes["ema.start"] = "its average begins with the base model's weights, not with generator_ckpt's"


def exit_bounds(recipe: Recipe) -> None:
    """Where blocks leave at steps of their own it has no bounds; else they are taken before the score's shift."""
    switches = [name for name in ("ts_schedule", "ts_schedule_max") if recipe.get(f"schedule.{name}")]
    if recipe.get("rollout.same_step_across_blocks") is False:
        for name in switches:
            recipe.set(f"schedule.{name}", False)
            recipe.notes[f"schedule.{name}"] = "without effect there where blocks leave at steps of their own"
        return
    shifts = recipe.get("schedule.timestep_shift"), recipe.get("schedule.score_timestep_shift")
    within = len(recipe.get("schedule.denoising_step_list") or []) > 1  # else the bounds are pure noise and none
    for name in switches if within and shifts[0] != shifts[1] else []:
        recipe.refuse(
            name,
            f"its bound is a step's level under model_kwargs.timestep_shift {shifts[0]}, shifted by timestep_shift "
            f"{shifts[1]}; here it is the step's own level. Make both shifts one, or set it to false",
        )


def put_batch(recipe: Recipe, accumulation: int = 1) -> None:
    """What the file cannot tell of the loop."""
    if recipe.get("training.global_batch_size") is None:
        recipe.missing["training.global_batch_size"] = f"GPUs times batch_size times {accumulation}, as its code has it"
    if recipe.get("training.max_steps") is None:
        recipe.missing["training.max_steps"] = "its code trains until somebody ends it"


def bound(recipe: Recipe) -> None:
    """Its least score timestep is drawn before the shift; ours bounds the shifted level."""
    shift, least = recipe.get("schedule.score_timestep_shift") or 1.0, recipe.staged.get("least_score", 0.0) / 1000
    recipe.set("schedule.min_score_timestep", round(1000 * shift * least / (1 + (shift - 1) * least), 6))
    if least:
        recipe.notes["schedule.min_score_timestep"] = "of the shifted level; theirs is drawn before the shift"


def guide(recipe: Recipe) -> None:
    """`guidance_scale` counts where no real_guidance_scale is said; the critic's is then none, whatever is said."""
    scale = recipe.staged.get("guidance")
    if scale is not None and recipe.get("objective.real_guidance_scale") is None:
        plus_one("objective.real_guidance_scale").carry(recipe, scale)
        recipe.notes["objective.real_guidance_scale"] = "w = s + 1: theirs is added to the conditional"
        if recipe.get("objective.fake_guidance_scale") is not None:
            recipe.set("objective.fake_guidance_scale", 1.0)
            recipe.notes["objective.fake_guidance_scale"] = (
                "fake_guidance_scale is read beside real_guidance_scale alone"
            )


DIALECT = Dialect(
    "self_forcing",
    RULES,
    defaults=SHARED_DEFAULTS,
    start={
        "trainer": "score_distillation",
        "student": {},
        "teacher": {},
        "critic": {},
        "data": {"kind": "wan", "real": False},
        "rollout.kind": "self_forcing",
        f"{STUDENT}.optimizer": {"kind": "adamw"},
        f"{CRITIC}.optimizer": {"kind": "adamw"},
    },
    finish=finish,
)
