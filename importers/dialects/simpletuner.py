"""SimpleTuner's `config.json` for `distillation_method: dmd`, and its data backends as a second file.

Read in bghira/SimpleTuner, `simpletuner/helpers/distillation/dmd/distiller.py` at 2eb7b31c, `self_forcing/pipeline.py`
at f1ac2e21 and `scheduler.py` at 90969929 beside it, `documentation/DATALOADER.md` at 04265fc1 and the DMD quickstart
(`documentation/distillation/FASTWAN_DMD.md`) at 0763a4ff. Guidance is uncond + w (cond - uncond), where 0 is none. Its
student learns by flow matching on its videos in every iteration too, and in each N-th by DMD beside it; here it learns
by DMD alone. Its scores draw a level for each frame; here a video has one. It takes the level of a timestep by place in
the scheduler's table, and its critic's output for the noise; here both are as in the papers. It rolls out as many
frames as its videos have.
"""

from __future__ import annotations

from typing import Any

from importers.data import STRIDE_T, finish_data, put_sizes
from importers.lora import ATTENTION, adapter_keys, put_adapter
from importers.networks import NETWORKS, base, spread_base
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    SPEED,
    STUDENT,
    UNREAD,
    VALIDATING,
    betas,
    checkpointing,
    count,
    flag,
    harmless,
    integer,
    later,
    must_be,
    number,
    one_of,
    optional,
    positive,
    precision,
    real,
    stage,
    steps,
    text,
    to,
    truth,
    whole,
)

D, B = "distillation_config.", "backend.*."
FLAVOURS = {
    "t2v-480p-1.3b-2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "t2v-480p-14b-2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "ti2v-5b-2.2": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}  # fmt: skip
GLOBAL = "training.global_batch_size"
LORA = adapter_keys("student")
CURVES = ("constant", "constant_with_warmup")
SOURCE = "of its videos, whose sizes its rollouts have: data.wan says ours"


def unguided(value: Any) -> float:
    """Its 0 leaves the network unguided."""
    return real(value) or 1.0


def curve(value: Any) -> str:
    if value not in CURVES:
        raise Untranslated(f"its curve was not read: {' and '.join(CURVES)} are the same")
    return str(value)


def clip_method(value: Any) -> str:
    if value not in ("norm", "value"):
        raise Untranslated("clip by norm or value")
    return str(value)


def kind(value: Any) -> bool:
    if value not in ("lora", "full"):
        raise Untranslated("lora or full")
    return bool(value == "lora")


def quantised(value: Any) -> str | None:
    if value in (None, "no_change"):
        return None
    if value not in ("int8-quanto", "int8-torchao"):
        raise Untranslated("an encoder in no_change or int8 can be carried over")
    return "int8"


def flavour(recipe: Recipe, value: Any) -> None:
    if value not in FLAVOURS:
        raise Untranslated(f"only {', '.join(FLAVOURS)} are carried over")
    recipe.staged["flavour"] = FLAVOURS[value]


def frames(recipe: Recipe, value: Any) -> None:
    known = recipe.staged.get("pixels", {}).get("frames")
    if known not in (None, positive(value)):
        raise Untranslated(f"other videos of it have {known} frames, and all have as many here")
    put_sizes(recipe, "pixels", frames=positive(value))


def low_bits(recipe: Recipe, value: Any) -> None:
    """Raises Untranslated for base weights of few bits."""
    if value not in (None, "no_change"):
        later("base weights of few bits").carry(recipe, value)


RULES: dict[str, Rule] = {
    "distillation_method": one_of("objective.kind", {"dmd": "dmd"}),
    f"{D}dmd_denoising_steps": steps("schedule.denoising_step_list"),
    f"{D}generator_update_interval": count("training.generator_update_interval"),
    f"{D}real_score_guidance_scale": to("objective.real_guidance_scale", unguided,
                                        "w as written; there it acts on batches with a negative embedding alone"),
    f"{D}fake_score_guidance_scale": to("objective.fake_guidance_scale", unguided),
    f"{D}fake_score_lr": number(f"{CRITIC}.optimizer.lr"),
    f"{D}fake_score_weight_decay": number(f"{CRITIC}.optimizer.weight_decay"),
    f"{D}fake_score_betas": betas(CRITIC),
    f"{D}fake_score_eps": number(f"{CRITIC}.optimizer.eps"),
    f"{D}fake_score_grad_clip": number(f"{CRITIC}.optimizer.clip_norm"),
    f"{D}min_timestep_ratio": to("schedule.min_score_timestep", lambda value: int(real(value) * 1000),
                                 "where no exit step bounds it"),
    f"{D}max_timestep_ratio": to("schedule.max_score_timestep", lambda value: int(real(value) * 1000),
                                 "where no exit step bounds it"),
    f"{D}num_frame_per_block": count("causal.num_frame_per_block"),
    f"{D}independent_first_frame": flag("causal.independent_first_frame"),
    f"{D}same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    f"{D}last_step_only": flag("rollout.last_step_only"),
    f"{D}ts_schedule": flag("schedule.ts_schedule"),
    f"{D}ts_schedule_max": flag("schedule.ts_schedule_max"),
    "flow_schedule_shift": number("schedule.timestep_shift"),
    "learning_rate": number(f"{STUDENT}.optimizer.lr"),
    **harmless("its code reads it under DeepSpeed alone", "adam_beta1", "adam_beta2", "adam_weight_decay",
               "adam_epsilon"),
    "optimizer": stage("optimizer", str, f"{STUDENT}.optimizer.kind"),
    "grad_clip_method": stage("clip_by", clip_method, f"{STUDENT}.optimizer.clip_norm"),
    "max_grad_norm": stage("clip", real, f"{STUDENT}.optimizer.clip_norm", f"{STUDENT}.optimizer.clip_value"),
    "lr_scheduler": stage("curve", curve, f"{STUDENT}.lr_schedule.kind"),
    "lr_warmup_steps": stage("warmup", integer, f"{STUDENT}.lr_schedule.warmup_steps"),
    "max_train_steps": count("training.max_steps"),
    "train_batch_size": count("training.micro_batch_size"),
    "gradient_accumulation_steps": stage("accumulation", positive, GLOBAL),
    "gradient_checkpointing": checkpointing,
    "mixed_precision": precision,
    "seed": whole("seed"),
    "use_ema": stage("use_ema", truth, "ema.decay"),
    "ema_decay": number("ema.decay"),
    "ema_update_interval": stage("ema_every", positive, "ema.every", "ema.decay"),
    "ema_validation": one_of("validation.weights", {"ema_only": "ema", "none": "raw", "comparison": "both"}),
    "checkpointing_steps": count("checkpoint.every"),
    "checkpoint_step_interval": count("checkpoint.every"),
    "checkpoints_total_limit": count("checkpoint.keep_last"),
    "pretrained_model_name_or_path": base(),
    "pretrained_t5_model_name_or_path": text("data.text.encoder"),
    "pretrained_vae_model_name_or_path": text("data.vae.path"),
    "model_family": must_be("wan"),
    "model_flavour": Rule(("student.preset", "teacher.preset", "critic.preset"), flavour),
    "model_type": stage("is_lora", kind, *LORA),
    "lora_rank": stage("lora_rank", positive, *LORA),
    "lora_alpha": stage("lora_alpha", optional, *LORA),
    "lora_type": must_be("standard"),
    "lora_dropout": must_be(0.0, why="an adapter has no dropout here"),
    "base_model_precision": Rule((), low_bits, "weights as they are"),
    "text_encoder_1_precision": to("data.text.quantization", quantised, "torchao's int8, a scale a row, in its place"),
    "caption_dropout_probability": must_be(
        0.0, why="its dropped caption is the empty text; ours, rollout.caption_dropout, is the negative prompt"
    ),
    "validation_seed": whole("validation.seed"),
    "validation_negative_prompt": text("data.negative_prompt"),
    "validation_step_interval": whole("validation.every"),
    "tracker_run_name": text("name"),
    "resume_from_checkpoint": must_be("latest", "", None, why="a run of theirs cannot be resumed here"),
    **harmless("the steps say it", "validation_num_inference_steps", "validation_guidance"),
    **harmless(VALIDATING, "validation_prompt", "validation_prompt_library", "validation_resolution",
               "validation_num_video_frames"),
    **harmless(LOGGING, "report_to", "push_to_hub", "push_checkpoints_to_hub", "hub_model_id", "output_dir",
               "webhook_config", "tracker_project_name", "disable_benchmark"),
    **harmless(SPEED, "attention_mechanism", "quantize_via", "compress_disk_cache", "vae_batch_size"),
    **harmless(SOURCE, "data_backend_config", "aspect_bucket_rounding", "resolution", "resolution_type",
               "minimum_image_size", "delete_problematic_images", "disable_bucket_pruning"),
    **harmless("max_train_steps ends the run", "num_train_epochs", "ignore_final_epochs"),
    **harmless("the rollout is as long as its videos", f"{D}num_training_frames"),
    **harmless(UNREAD, f"{D}simulate_generator_forward", f"{D}fake_score_lr_scheduler", f"{D}min_lr_ratio",
               f"{D}min_score_timestep", f"{D}timestep_shift", f"{D}fake_score_use_ema", f"{D}adversarial_weight",
               f"{D}shift", f"{D}context_noise"),
    f"{B}video.num_frames": Rule(("data.wan.frames",), frames),
    **harmless("its loader reads video.num_frames", f"{B}num_frames"),
    f"{B}dataset_type": must_be("video", "text_embeds", why="its videos and their texts alone"),
    **harmless(SOURCE, f"{B}id", f"{B}type", f"{B}cache_dir", f"{B}cache_dir_vae", f"{B}resolution_type", f"{B}crop",
               f"{B}frame_interval", f"{B}resolution", f"{B}minimum_image_size", f"{B}repeats", f"{B}default",
               f"{B}instance_data_dir", f"{B}caption_strategy", f"{B}disabled", f"{B}video.min_frames"),
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "distillation_method": "dmd", f"{D}dmd_denoising_steps": "1000,757,522", f"{D}generator_update_interval": 1,
    f"{D}real_score_guidance_scale": 3.0, f"{D}fake_score_guidance_scale": 0.0, f"{D}fake_score_lr": 1e-5,
    f"{D}fake_score_weight_decay": 0.01, f"{D}fake_score_betas": [0.9, 0.999], f"{D}fake_score_eps": 1e-8,
    f"{D}fake_score_grad_clip": 1.0, f"{D}min_timestep_ratio": 0.02, f"{D}max_timestep_ratio": 0.98,
    f"{D}num_frame_per_block": 3, f"{D}independent_first_frame": False, f"{D}same_step_across_blocks": False,
    f"{D}last_step_only": False, f"{D}ts_schedule": True,
    f"{D}ts_schedule_max": False, "grad_clip_method": "value", "max_grad_norm": 2.0,
    "train_batch_size": 4, "gradient_accumulation_steps": 1, "use_ema": False, "ema_decay": 0.995,
    "model_type": "full", "lora_rank": 16, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0,
    "flow_schedule_shift": 3.0,
}  # fmt: skip


def finish(recipe: Recipe) -> None:
    staged = recipe.staged
    if (optimizer := staged.get("optimizer", "")) != "torch-adamw":
        is_bf16 = "bf16" in optimizer
        why = "AdamW in bf16: a later version will support it" if is_bf16 else "AdamW alone is ours"
        recipe.refuse("optimizer", f"{why}; its name of ours is torch-adamw")
    recipe.set(f"{STUDENT}.optimizer.clip_{staged['clip_by']}", staged["clip"])
    recipe.set(f"{STUDENT}.optimizer.clip_{'norm' if staged['clip_by'] == 'value' else 'value'}", None)
    interval = recipe.get("training.generator_update_interval")
    warmup = staged.get("warmup", 0) if staged.get("curve") == "constant_with_warmup" else 0
    recipe.set(f"{STUDENT}.lr_schedule", {"kind": "constant", "warmup_steps": -(-warmup // interval)})
    recipe.set("training.critic_warmup_steps", interval - 1)
    recipe.notes["training.critic_warmup_steps"] = f"its DMD begins in iteration {interval}"
    recipe.notes["objective.kind"] = (
        "its student learns by flow matching on its videos too, and is its own teacher; its loader drops an object of "
        "distillation_config, which is read here as it is meant"
    )
    recipe.set("objective.critic_loss", "flow")
    recipe.notes["objective.critic_loss"] = "its critic's output is held against the noise, here against the velocity"
    recipe.notes["schedule.denoising_step_list"] = (
        "timestep t is the level t/1000; there it is entry t of the scheduler's table, which falls from pure noise"
    )
    recipe.notes["schedule.score_timestep_shift"] = "none: it draws whole timesteps evenly, one for each frame"
    recipe.missing[GLOBAL] = f"{recipe.get('training.micro_batch_size') * staged['accumulation']} times the GPUs"
    _exit_steps(recipe)
    _average(recipe)
    _whole_blocks(recipe)
    spread_base(recipe, staged.get("flavour", FLAVOURS["t2v-480p-1.3b-2.1"]))
    if staged["is_lora"]:
        alpha = staged.get("lora_alpha")
        put_adapter(recipe, "student", staged["lora_rank"], None if alpha is None else float(alpha), ATTENTION)
        recipe.notes["student.lora"] = "its adapter has a dropout of 0.1 where lora_dropout is left out, ours none"
        recipe.notes["critic.lora"] = "its critic trains all weights; an adapter like the student's would save a copy"
    finish_data(recipe)


def _exit_steps(recipe: Recipe) -> None:
    by_exit = recipe.get("schedule.ts_schedule") or recipe.get("schedule.ts_schedule_max")
    if by_exit and not recipe.get("rollout.same_step_across_blocks"):
        recipe.set("rollout.same_step_across_blocks", True)
        recipe.notes["rollout.same_step_across_blocks"] = (
            "it draws a step for each block and takes the last one's for ts_schedule; here that needs one for all"
        )


def _average(recipe: Recipe) -> None:
    """Its average follows iterations, ours the student's updates, which are each N-th of them."""
    if not recipe.staged["use_ema"]:
        recipe.set("ema.decay", None)
        return
    interval, every = recipe.get("training.generator_update_interval"), recipe.staged.get("ema_every", 1)
    if every % interval == 0:
        recipe.set("ema.every", every // interval)
        recipe.notes["ema.every"] = f"each {every} iterations, of which each {interval}-th is an update of the student"
    elif interval % every == 0 and 0 <= (decay := recipe.get("ema.decay")) <= 1:
        recipe.set("ema.decay", decay ** (interval // every))
        recipe.notes["ema.decay"] = f"{decay} to the power of {interval // every}: of all iterations up to an update"
    else:
        recipe.refuse("ema_update_interval", f"it falls on no whole number of the student's updates, each {interval}")


def _whole_blocks(recipe: Recipe) -> None:
    if (pixels := recipe.staged.get("pixels", {}).get("frames")) is None:
        return
    count = (pixels - 1) // STRIDE_T + 1
    block, first = recipe.get("causal.num_frame_per_block"), int(recipe.get("causal.independent_first_frame"))
    if count <= first or (count - first) % block:
        recipe.refuse(
            "video.num_frames", f"{count} latent frames are not whole blocks of {block}, and its code stops at that"
        )


DIALECT = Dialect(
    "simpletuner", RULES, DEFAULTS,
    {
        "trainer": "score_distillation",
        **{name: {} for name in NETWORKS},
        "data": {"kind": "wan", "real": False},
        "rollout.kind": "self_forcing",
        "schedule": {"warp_denoising_step": False, "score_timestep_shift": 1.0, "min_sigma": 0.0, "max_sigma": 1.0},
        f"{STUDENT}.optimizer": {"kind": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8},
        f"{CRITIC}.optimizer": {"kind": "adamw"},
    },
    finish,
)  # fmt: skip
