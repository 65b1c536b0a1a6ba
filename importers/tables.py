"""What the options of Self-Forcing, SimpleTuner and FastVideo are here. See `importers/translate.py`.

Guidance: Self-Forcing and FastVideo write `cond + s (cond - uncond)`, which is `w = s + 1` here; SimpleTuner has ours,
`uncond + w (cond - uncond)`, but its 0 is no guidance, which is `w = 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from importers import lora
from importers.data import finish_data
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    beta,
    betas,
    both,
    checkpointing,
    critic_learns_ode,
    finish_updates,
    flag,
    must_be,
    network,
    number,
    one_of,
    plus_one,
    precision,
    shape,
    spread_base,
    steps,
    text,
    weights,
    whole,
)

G, C = "generator_training", "critic_training"
NETWORKS = ("student", "teacher", "critic")

SELF_FORCING_RULES: dict[str, Rule] = {
    "generator_ckpt": weights("student"),
    "generator_name": network("student"),
    "real_name": network("teacher"),
    "fake_name": network("critic"),
    "denoising_step_list": steps("schedule.denoising_step_list"),
    "warp_denoising_step": flag("schedule.warp_denoising_step"),
    "ts_schedule": flag("schedule.ts_schedule"),
    "ts_schedule_max": flag("schedule.ts_schedule_max"),
    "min_score_timestep": number("schedule.min_score_timestep"),
    "num_train_timestep": must_be(1000),
    "timestep_shift": number("schedule.score_timestep_shift"),
    "model_kwargs.timestep_shift": number("schedule.timestep_shift"),
    "model_kwargs.local_attn_size": lambda r, v: None if v == -1 else r.set("causal.window_frames", int(v)),
    "model_kwargs.sink_size": whole("causal.sink_frames"),
    "guidance_scale": plus_one("objective.real_guidance_scale"),
    "real_guidance_scale": plus_one("objective.real_guidance_scale"),
    "fake_guidance_scale": plus_one("objective.fake_guidance_scale"),
    "denoising_loss_type": one_of("objective.critic_loss", {"flow": "flow", "x0": "x0"}),
    "distribution_loss": one_of("objective.kind", {"dmd": "dmd", "sid": "sid"}),
    "sid_alpha": number("objective.sid_alpha"),
    "trainer": critic_learns_ode,
    "mixed_precision": precision,
    "seed": whole("seed"),
    "lr": number(f"{G}.optimizer.lr"),
    "lr_critic": number(f"{C}.optimizer.lr"),
    "beta1": beta(G, 0),
    "beta2": beta(G, 1),
    "beta1_critic": beta(C, 0),
    "beta2_critic": beta(C, 1),
    "weight_decay": both("weight_decay"),
    "max_grad_norm_generator": number(f"{G}.optimizer.clip_norm"),
    "max_grad_norm_critic": number(f"{C}.optimizer.clip_norm"),
    "data_path": "data.prompts",
    "negative_prompt": "data.negative_prompt",
    "batch_size": whole("training.micro_batch_size"),
    "total_batch_size": whole("training.global_batch_size"),
    "ema_weight": lambda r, v: r.set("ema.decay", float(v) or None),
    "ema_start_step": whole("ema.start"),
    "log_iters": whole("checkpoint.every"),
    "dfake_gen_update_ratio": whole("training.generator_update_interval"),
    "image_or_video_shape": shape,
    "gradient_checkpointing": checkpointing,
    "num_frame_per_block": whole("causal.num_frame_per_block"),
    "independent_first_frame": flag("causal.independent_first_frame"),
    "context_noise": number("causal.context_noise"),
    "same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    "last_step_only": flag("rollout.last_step_only"),
    "num_training_frames": whole("rollout.num_training_frames"),
    "load_raw_video": must_be(False),
    "causal": must_be(True),
    "i2v": must_be(False),
    **dict.fromkeys((
        "generator_fsdp_wrap_strategy", "real_score_fsdp_wrap_strategy", "fake_score_fsdp_wrap_strategy",
        "text_encoder_fsdp_wrap_strategy", "sharding_strategy", "wandb_host", "wandb_key", "wandb_entity",
        "wandb_project", "disable_wandb", "logdir", "config_name", "no_save", "no_visualize", "gc_interval",
    )),
}  # fmt: skip


def self_forcing_finish(recipe: Recipe) -> None:
    finish_data(recipe)
    finish_updates(recipe)


SELF_FORCING = Dialect(
    SELF_FORCING_RULES,
    start={
        "trainer": "score_distillation",
        "student": {"preset": "1.3b"},
        "teacher": {"preset": "1.3b"},
        "critic": {"preset": "1.3b", "init": "Wan2.1-T2V-1.3B"},
        "data": {"kind": "wan", "real": False},
        "rollout.kind": "self_forcing",
        f"{G}.optimizer": {"kind": "adamw", "weight_decay": 0.01, "clip_norm": 10.0},
        f"{C}.optimizer": {"clip_norm": 10.0},
    },
    finish=self_forcing_finish,
)


def simpletuner_clip(recipe: Recipe, value: Any) -> None:
    recipe.set(f"{G}.optimizer.clip_norm", float(value))


def simpletuner_clip_method(recipe: Recipe, value: Any) -> None:
    if value not in ("norm", "value"):
        raise Untranslated("clip by norm or value")
    recipe.set("clip_by", value)


def lr_kind(section: str) -> Callable[[Recipe, Any], None]:
    known = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
             "cosine_with_min_lr": "cosine"}  # fmt: skip
    return one_of(f"{section}.lr_schedule.kind", known)


def no_zero(path: str) -> Callable[[Recipe, Any], None]:
    """Its 0 leaves the network unguided."""
    return lambda recipe, value: recipe.set(path, float(value) or 1.0)


def simpletuner_finish(recipe: Recipe) -> None:
    optimizer = recipe.get(f"{G}.optimizer")
    if recipe.values.pop("clip_by", "value") == "value" and "clip_norm" in optimizer:  # its own default
        optimizer["clip_value"], optimizer["clip_norm"] = optimizer.pop("clip_norm"), None
    accumulated = recipe.values.pop("accumulation", 1)
    micro = recipe.get("training.micro_batch_size") or 1
    recipe.set("training.global_batch_size", micro * accumulated)
    recipe.notes += [
        "training.global_batch_size: one GPU's; its global batch grows with the number of GPUs: multiply it",
        "objective.real_guidance_scale: w as written; there it acts only on batches that bring a negative embedding",
        "objective: its student also learns by flow matching on its videos, in every iteration; here it does not",
    ]
    by_exit = recipe.get("schedule.ts_schedule") or recipe.get("schedule.ts_schedule_max")
    if by_exit and not recipe.get("rollout.same_step_across_blocks"):
        recipe.set("rollout.same_step_across_blocks", True)
        recipe.notes.append(
            "rollout.same_step_across_blocks: it draws a step for each block and takes the last one's for ts_schedule; "
            "here ts_schedule needs one step for all"
        )
    flavour = recipe.values.pop("flavour")
    recipe.set("base", recipe.get("base") or flavour)
    spread_base(recipe)
    lora.finish_simpletuner(recipe)
    finish_data(recipe)
    finish_updates(recipe)


D = "distillation_config"
FLAVOURS = {
    "t2v-480p-1.3b-2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "t2v-480p-14b-2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "i2v-14b-2.1": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "i2v-14b-2.1-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "ti2v-5b-2.2": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}  # fmt: skip
SIMPLETUNER_RULES: dict[str, Rule] = {
    "distillation_method": must_be("dmd"),
    f"{D}.dmd_denoising_steps": steps("schedule.denoising_step_list"),
    f"{D}.generator_update_interval": whole("training.generator_update_interval"),
    f"{D}.real_score_guidance_scale": no_zero("objective.real_guidance_scale"),
    f"{D}.fake_score_guidance_scale": no_zero("objective.fake_guidance_scale"),
    f"{D}.fake_score_lr": number(f"{C}.optimizer.lr"),
    f"{D}.fake_score_weight_decay": number(f"{C}.optimizer.weight_decay"),
    f"{D}.fake_score_betas": betas(C),
    f"{D}.fake_score_eps": number(f"{C}.optimizer.eps"),
    f"{D}.fake_score_grad_clip": number(f"{C}.optimizer.clip_norm"),
    f"{D}.fake_score_lr_scheduler": lr_kind(C),
    f"{D}.min_lr_ratio": number(f"{C}.lr_schedule.floor"),
    f"{D}.min_timestep_ratio": must_be(0.02),
    f"{D}.max_timestep_ratio": must_be(0.98),
    f"{D}.num_frame_per_block": whole("causal.num_frame_per_block"),
    f"{D}.independent_first_frame": flag("causal.independent_first_frame"),
    f"{D}.same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    f"{D}.last_step_only": flag("rollout.last_step_only"),
    f"{D}.num_training_frames": whole("size.frames"),
    f"{D}.context_noise": number("causal.context_noise"),
    f"{D}.ts_schedule": flag("schedule.ts_schedule"),
    f"{D}.ts_schedule_max": flag("schedule.ts_schedule_max"),
    f"{D}.min_score_timestep": number("schedule.min_score_timestep"),
    f"{D}.timestep_shift": number("schedule.score_timestep_shift"),
    "flow_schedule_shift": number("schedule.timestep_shift"),
    "learning_rate": number(f"{G}.optimizer.lr"),
    "adam_beta1": beta(G, 0),
    "adam_beta2": beta(G, 1),
    "adam_weight_decay": number(f"{G}.optimizer.weight_decay"),
    "adam_epsilon": number(f"{G}.optimizer.eps"),
    "optimizer": one_of(f"{G}.optimizer.kind", {"adamw": "adamw", "adamw_bf16": "adamw"}),
    "grad_clip_method": simpletuner_clip_method,
    "max_grad_norm": simpletuner_clip,
    "lr_scheduler": lr_kind(G),
    "lr_warmup_steps": whole(f"{G}.lr_schedule.warmup_steps"),
    "max_train_steps": whole("training.max_steps"),
    "train_batch_size": whole("training.micro_batch_size"),
    "gradient_accumulation_steps": whole("accumulation"),
    "gradient_checkpointing": checkpointing,
    "mixed_precision": precision,
    "seed": whole("seed"),
    "use_ema": flag("ema.enabled"),
    "ema_decay": number("ema.decay"),
    "ema_update_interval": whole("ema.every"),
    "checkpointing_steps": whole("checkpoint.every"),
    "checkpoint_step_interval": whole("checkpoint.every"),
    "checkpoints_total_limit": whole("checkpoint.keep_last"),
    "pretrained_model_name_or_path": text("base"),
    "pretrained_t5_model_name_or_path": "data.text.encoder",
    "pretrained_vae_model_name_or_path": "data.vae.path",
    "model_family": must_be("wan"),
    "model_flavour": one_of("flavour", FLAVOURS),
    "model_type": lora.simpletuner_kind,
    "lora_rank": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_type": lora.simpletuner_type,
    "lora_dropout": lora.no_dropout,
    "validation_seed": whole("validation.seed"),
    "validation_negative_prompt": "data.negative_prompt",
    "validation_step_interval": whole("validation.every"),
    "tracker_run_name": "name",
    **dict.fromkeys((
        "report_to", "push_to_hub", "push_checkpoints_to_hub", "hub_model_id", "output_dir", "webhook_config",
        "tracker_project_name", "resume_from_checkpoint", "disable_benchmark", "compress_disk_cache", "quantize_via",
    )),
}  # fmt: skip

SIMPLETUNER = Dialect(
    SIMPLETUNER_RULES,
    start={
        "trainer": "score_distillation",
        **{name: {} for name in NETWORKS},
        "size": {"frames": 21},
        "flavour": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",  # its own default
        "data": {"kind": "wan", "real": False},
        "rollout": {"kind": "self_forcing", "same_step_across_blocks": False},
        "schedule": {"denoising_step_list": [1000, 757, 522], "warp_denoising_step": False, "score_timestep_shift": 1.0,
                     "ts_schedule": True},
        "objective": {"kind": "dmd", "real_guidance_scale": 3.0},
        "training": {"generator_update_interval": 1, "micro_batch_size": 1},
        f"{G}.optimizer": {"kind": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01, "clip_norm": 2.0},
        f"{C}.optimizer": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8, "clip_norm": 1.0,
                           "clip_value": None},
        "ema.enabled": False,
    },
    finish=simpletuner_finish,
)  # fmt: skip


def fastvideo_batch(recipe: Recipe, value: Any) -> None:
    recipe.set("gpus", int(value))


def fastvideo_finish(recipe: Recipe) -> None:
    gpus, sequence = recipe.values.pop("gpus", 1), recipe.get("parallel.sequence") or 1
    micro = recipe.get("training.micro_batch_size") or 1
    recipe.set("training.global_batch_size", micro * recipe.values.pop("accumulation", 1) * max(gpus // sequence, 1))
    shift = recipe.get("schedule.timestep_shift")
    if shift is not None:
        recipe.set("schedule.score_timestep_shift", shift)
    fastvideo_inputs(recipe)
    spread_base(recipe)
    lora.finish_fastvideo(recipe)
    finish_data(recipe)
    finish_updates(recipe)


def fastvideo_inputs(recipe: Recipe) -> None:
    """What the student starts from: its own samples, or noised videos where it is not told to simulate them."""
    causal, simulated = recipe.values.pop("self_forcing", False), recipe.values.pop("simulated", False)
    stored = recipe.values.pop("stored", None)
    same_step = recipe.values.pop("same_step", None)
    if causal:
        recipe.set("rollout.same_step_across_blocks", bool(same_step))
    elif same_step is not None:
        recipe.left.append(f"same_step_across_blocks: {same_step} (a bidirectional student has one block)")
    if causal or simulated or stored is None:
        recipe.set("rollout.kind", "self_forcing" if causal else "backward_simulation")
    else:
        recipe.set("rollout.kind", "noised_data")
        recipe.values["data"] |= {"real": True, "latents": stored}
    if not causal and not simulated and stored is None:
        recipe.notes.append(
            "rollout.kind: without simulate_generator_forward its student starts from noised videos, and the file "
            "names none: for these, set noised_data, data.real true and data.latents"
        )
    if stored is not None and (causal or simulated):
        recipe.left.append(f"data_path: {stored} (stored embeddings of prompts: give data.prompts)")


def block(recipe: Recipe, value: Any) -> None:
    recipe.set("causal.num_frame_per_block", int(value))
    recipe.set("self_forcing", True)


def critic_rate(recipe: Recipe, value: Any) -> None:
    if float(value):  # 0 is the student's
        recipe.set(f"{C}.optimizer.lr", float(value))


FASTVIDEO_RULES: dict[str, Rule] = {
    "max_train_steps": whole("training.max_steps"),
    "train_batch_size": whole("training.micro_batch_size"),
    "gradient_accumulation_steps": whole("accumulation"),
    "num_gpus": fastvideo_batch,
    "sp_size": whole("parallel.sequence"),
    "hsdp_replicate_dim": lambda r, v: None if v == 1 else r.set("parallel.replicate", int(v)),
    "hsdp_shard_dim": lambda r, v: r.set("parallel.shard", int(v)),
    "tp_size": must_be(1),
    "data_path": text("stored"),
    "num_latent_t": whole("size.frames"),
    "num_frames": whole("pixels.frames"),
    "num_height": whole("pixels.height"),
    "num_width": whole("pixels.width"),
    "enable_gradient_checkpointing_type": checkpointing,
    "simulate_generator_forward": flag("simulated"),
    "num_frame_per_block": block,
    "independent_first_frame": flag("causal.independent_first_frame"),
    "same_step_across_blocks": flag("same_step"),
    "last_step_only": flag("rollout.last_step_only"),
    "context_noise": number("causal.context_noise"),
    "pretrained_model_name_or_path": text("base"),
    "generator_model_path": network("student"),
    "real_score_model_path": network("teacher"),
    "fake_score_model_path": network("critic"),
    "init_weights_from_safetensors": weights("student"),
    "learning_rate": number(f"{G}.optimizer.lr"),
    "fake_score_learning_rate": critic_rate,
    "weight_decay": both("weight_decay"),
    "betas": betas(G),
    "fake_score_betas": betas(C),
    "max_grad_norm": both("clip_norm"),
    "mixed_precision": precision,
    "training_state_checkpointing_steps": whole("checkpoint.every"),
    "checkpoints_total_limit": whole("checkpoint.keep_last"),
    "flow_shift": number("schedule.timestep_shift"),
    "seed": whole("seed"),
    "use_ema": flag("ema.enabled"),
    "ema_decay": number("ema.decay"),
    "ema_start_step": whole("ema.start"),
    "dmd_denoising_steps": steps("schedule.denoising_step_list"),
    "min_timestep_ratio": must_be(0.02),
    "max_timestep_ratio": must_be(0.98),
    "generator_update_interval": whole("training.generator_update_interval"),
    "dfake_gen_update_ratio": whole("training.generator_update_interval"),
    "real_score_guidance_scale": plus_one("objective.real_guidance_scale"),
    "warp_denoising_step": flag("schedule.warp_denoising_step"),
    "training_cfg_rate": must_be(0.0),
    "lora_training": flag("adapter.on"),
    "lora_rank": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_target_modules": lora.fastvideo_targets,
    **dict.fromkeys((
        "tracker_project_name", "output_dir", "log_validation", "log_visualization", "dataloader_num_workers",
        "model_path",
        "inference_mode", "allow_tf32", "weight_only_checkpointing_steps", "train_sp_batch_size",
        "validate_cache_structure",
    )),
}  # fmt: skip

FASTVIDEO = Dialect(
    FASTVIDEO_RULES,
    start={
        "trainer": "score_distillation",
        **{name: {} for name in NETWORKS},
        "data": {"kind": "wan", "real": False},
        "schedule": {"denoising_step_list": [1000, 757, 522], "warp_denoising_step": False},
        "objective": {"kind": "dmd", "real_guidance_scale": 4.5},
        "training.generator_update_interval": 5,
        f"{G}.optimizer": {"kind": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01},
        f"{C}.optimizer.betas": [0.9, 0.999],
    },
    finish=fastvideo_finish,
)

DIALECTS = {"self_forcing": SELF_FORCING, "simpletuner": SIMPLETUNER, "fastvideo": FASTVIDEO}
