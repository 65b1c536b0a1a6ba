"""FastVideo's launchers `*_distillation_pipeline.py`: shell scripts, flat files of their options, and `--config` files.

Read in hao-ai-lab/FastVideo, `fastvideo/fastvideo_args.py` at 00e61a50 and `fastvideo/training/*.py`. Guidance is
cond + s (cond - uncond). An option that a script leaves out has the value of the argument parser, not of the data
class: no clipping, 10 updates of warm-up, min_timestep_ratio 0.2. Student updates are made in iterations N, 2N, ...,
counted from 1. The modular trainer, which has other conventions, is `fastvideo_modular.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from importers.data import finish_data, put_sizes
from importers.dialects.fastvideo_parts import (
    adapters,
    batch,
    check_models,
    curves,
    phase,
    ratio,
    shift_of,
    single,
    sparse,
)
from importers.lora import adapter_keys, names_of
from importers.networks import base, model, spread_base, weights
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    SPEED,
    STUDENT,
    UNREAD,
    VALIDATING,
    betas,
    both,
    checkpointing,
    count,
    flag,
    harmless,
    integer,
    must_be,
    number,
    optional,
    plus_one,
    positive,
    real,
    refused,
    stage,
    steps,
    to,
    truth,
    whole,
)

DMD, SELF_FORCING = "wan_distillation_pipeline.py", "wan_self_forcing_distillation_pipeline.py"
SIZES = ("data.wan.frames", "data.wan.height", "data.wan.width")
GLOBAL = "training.global_batch_size"
SPARSE = ("student.sparse.sparsity", "student.sparse.ramp_step", "student.sparse.ramp_every")
LORA = adapter_keys("student", "critic")
NEEDED = (
    "program", "pretrained_model_name_or_path", "learning_rate", "weight_decay", "dmd_denoising_steps", "num_latent_t",
    "num_height", "num_width", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "sp_size",
    "hsdp_shard_dim",
)  # fmt: skip
JUDGED = 21  # latent frames that its self-forcing judges


def side(name: str, key: str) -> Rule:
    return Rule((f"data.wan.{key}",), lambda r, v: put_sizes(r, name, **{key: positive(v)}))


def backend(recipe: Recipe, value: Any) -> None:
    if value not in ("VIDEO_SPARSE_ATTN", "FLASH_ATTN", "TORCH_SDPA"):
        raise Untranslated("dense attention and VIDEO_SPARSE_ATTN can be carried over")
    recipe.staged["vsa"] = value == "VIDEO_SPARSE_ATTN"


def program(recipe: Recipe, value: Any) -> None:
    if value not in (DMD, SELF_FORCING):
        raise Untranslated(f"only the launchers {DMD} and {SELF_FORCING} are carried over")


def critic_rate(recipe: Recipe, value: Any) -> None:
    if real(value):  # its 0 is the student's
        recipe.set(f"{CRITIC}.optimizer.lr", real(value))


def clip(recipe: Recipe, value: Any) -> None:
    for section in (STUDENT, CRITIC):
        recipe.set(f"{section}.optimizer.clip_norm", None if value is None else real(value))


def as_its_base(name: str) -> Rule:
    """A model that its code does not load, if it is another one than `pretrained_model_name_or_path`."""
    return stage(name, str, why="its code loads pretrained_model_name_or_path, which is the same")


CURVE = (f"{STUDENT}.lr_schedule.kind", f"{CRITIC}.lr_schedule.kind")
COMMON: dict[str, Rule] = {
    "program": Rule((), program, "the launcher"),
    "env.FASTVIDEO_ATTENTION_BACKEND": Rule(SPARSE, backend),
    "pretrained_model_name_or_path": base(),
    "model_path": as_its_base("model_path"),
    "generator_model_path": as_its_base("generator_model_path"),
    "real_score_model_path": model("teacher"),
    "fake_score_model_path": model("critic"),
    "init_weights_from_safetensors": weights("student"),
    "init_weights_from_safetensors_2": refused("two experts are trained one at a time here"),
    "boundary_ratio": refused("two experts are trained one at a time here"),
    "workload_type": must_be("t2v"),
    "training_cfg_rate": must_be(0.0, why="it zeroes text embeddings; here a dropped prompt is the negative one"),
    "train_batch_size": to("training.micro_batch_size", single),
    "gradient_accumulation_steps": stage("accumulation", positive, GLOBAL),
    "sp_size": count("parallel.sequence"),
    "hsdp_replicate_dim": stage("replicate", positive, "parallel.replicate", GLOBAL),
    "hsdp_shard_dim": stage("shard", positive, "parallel.shard", GLOBAL,
                            why="it counts the ranks that share a sample; here shard does not"),
    "num_gpus": Rule((), lambda recipe, value: None, "its launcher's ranks count: replicate x shard"),
    "tp_size": must_be(1, -1),
    "num_latent_t": side("size", "frames"),
    "num_height": side("pixels", "height"),
    "num_width": side("pixels", "width"),
    "seed": whole("seed"),
    "learning_rate": number(f"{STUDENT}.optimizer.lr"),
    "betas": betas(STUDENT),
    "weight_decay": both("weight_decay"),
    "fake_score_learning_rate": Rule((f"{CRITIC}.optimizer.lr",), critic_rate),
    "fake_score_betas": betas(CRITIC),
    "max_grad_norm": Rule((f"{STUDENT}.optimizer.clip_norm", f"{CRITIC}.optimizer.clip_norm"), clip),
    "lr_scheduler": stage("curve", str, CURVE[0]),
    "fake_score_lr_scheduler": stage("critic_curve", str, CURVE[1]),
    "lr_warmup_steps": stage("warmup", integer, f"{STUDENT}.lr_schedule.warmup_steps",
                             f"{CRITIC}.lr_schedule.warmup_steps"),
    "max_train_steps": count("training.max_steps"),
    "use_ema": stage("use_ema", truth, "ema.decay"),
    "ema_decay": number("ema.decay"),
    "ema_start_step": whole("ema.start"),
    "dit_precision": must_be("fp32"),
    "dmd_denoising_steps": steps("schedule.denoising_step_list"),
    "warp_denoising_step": flag("schedule.warp_denoising_step"),
    "flow_shift": stage("shift", real, "schedule.score_timestep_shift", "schedule.timestep_shift"),
    "min_timestep_ratio": to("schedule.min_sigma", ratio),
    "max_timestep_ratio": to("schedule.max_sigma", ratio),
    "real_score_guidance_scale": plus_one("objective.real_guidance_scale"),
    "VSA_sparsity": stage("sparsity", real, *SPARSE),
    "VSA_decay_rate": stage("ramp", real, *SPARSE),
    "VSA_decay_interval_steps": stage("ramp_every", positive, *SPARSE),
    "lora_training": stage("lora", truth, *LORA),
    "lora_rank": stage("lora_rank", positive, *LORA),
    "lora_alpha": stage("lora_alpha", optional, *LORA),
    "lora_target_modules": stage("lora_names", names_of, *LORA),
    "enable_gradient_checkpointing_type": checkpointing,
    "training_state_checkpointing_steps": count("checkpoint.every"),
    "checkpoints_total_limit": count("checkpoint.keep_last", "its code keeps them all"),
    "num_train_epochs": must_be(1, 0, why="its code counts max_train_steps"),
    **{name: refused(why) for name, why in {
        "transformer_quant": "a student in low precision is none of ours", "scale_lr": "its code does not read it",
        "moba_config_path": "VMoBA is none of ours", "lora_path": "merge it into the weights: student.loras",
        "resume_from_checkpoint": "a run of theirs cannot be resumed here", "revision": "give a folder of it",
        "override_text_encoder_safetensors": "another text encoder", "override_pipeline_cls_name": "another pipeline",
        "enable_bsa": "block-sparse attention is none of ours",
    }.items()},
    **harmless(LOGGING, "tracker_project_name", "trackers", "wandb_run_name", "output_dir", "logging_dir", "log_level",
               "weight_only_checkpointing_steps"),
    **harmless(SPEED, "dataloader_num_workers", "pin_cpu_memory", "VSA_cache_tile_buf", "allow_tf32", "master_port",
               "enable_torch_compile", "torch_compile_kwargs", "dit_cpu_offload", "dit_layerwise_offload",
               "use_fsdp_inference", "text_encoder_cpu_offload", "image_encoder_cpu_offload", "vae_cpu_offload",
               "vae_tiling", "vae_sp", "selective_checkpointing", "fsdp_sharding_strategy", "trust_remote_code",
               "distributed_executor_backend", "dist_timeout", "text_encoder_precisions", "vae_precision"),
    **harmless(VALIDATING, "log_validation", "log_visualization", "visualization_steps", "validation_dataset_file",
               "validation_steps", "validation_sampling_steps", "validation_guidance_scale", "num_frames",
               "validation_preprocessed_path", "num_inference_steps", "VSA_val_sparsity", "embedded_cfg_scale"),
    **harmless(UNREAD, "mode", "inference_mode", "mixed_precision", "master_weight_type", "train_sp_batch_size",
               "validate_cache_structure", "enable_gradient_masking", "gradient_mask_last_n_frames",
               "dit_model_name_or_path", "cache_dir", "multi_phased_distill_schedule", "pred_decay_weight",
               "pred_decay_type", "hunyuan_teacher_disable_cfg", "distill_cfg", "scheduler_type",
               "linear_quadratic_threshold", "linear_range", "num_euler_timesteps", "not_apply_cfg_solver",
               "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs", "group_frame",
               "group_resolution", "ema_update_after"),
}  # fmt: skip
COMMON_DEFAULTS = {
    "hsdp_replicate_dim": 1, "seed": 42, "betas": "0.9,0.999",
    "fake_score_betas": "0.9,0.999", "fake_score_learning_rate": 0.0, "max_grad_norm": None, "lr_scheduler": "constant",
    "fake_score_lr_scheduler": "constant", "lr_warmup_steps": 10, "use_ema": False, "ema_decay": 0.999,
    "ema_start_step": 0, "min_timestep_ratio": 0.2, "max_timestep_ratio": 0.98, "real_score_guidance_scale": 3.5,
    "warp_denoising_step": False, "VSA_sparsity": 0.0, "VSA_decay_rate": 0.01, "VSA_decay_interval_steps": 1,
    "lora_training": False,
}  # fmt: skip
START = {
    "trainer": "score_distillation",
    **{name: {} for name in ("student", "teacher", "critic")},
    "data": {"kind": "wan", "real": False},
    "objective.kind": "dmd",
    "training.precision": "bf16",
    f"{STUDENT}.optimizer": {"kind": "adamw"},
    f"{CRITIC}.optimizer": {"kind": "adamw"},
}

DMD_RULES: dict[str, Rule] = {
    **COMMON,
    "data_path": stage("stored", str, "data.latents"),
    "simulate_generator_forward": stage("simulated", truth, "rollout.kind"),
    "generator_update_interval": count("training.generator_update_interval"),
    "override_transformer_cls_name": must_be("WanTransformer3DModel"),
    **harmless("its launcher of bidirectional students does not read it", "dfake_gen_update_ratio",
               "num_frame_per_block", "independent_first_frame", "same_step_across_blocks", "last_step_only",
               "context_noise"),
}  # fmt: skip
SELF_FORCING_RULES: dict[str, Rule] = {
    **COMMON,
    "data_path": Rule((), lambda recipe, value: None, "stored embeddings of prompts: give data.prompts"),
    "simulate_generator_forward": must_be(True, why="without it its critic learns from samples of another kind"),
    "dfake_gen_update_ratio": count("training.generator_update_interval"),
    "num_frame_per_block": count("causal.num_frame_per_block"),
    "independent_first_frame": flag("causal.independent_first_frame"),
    "same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    "last_step_only": flag("rollout.last_step_only"),
    "context_noise": number("causal.context_noise"),
    "override_transformer_cls_name": must_be("CausalWanTransformer3DModel"),
    **harmless("its launcher of causal students reads dfake_gen_update_ratio", "generator_update_interval"),
}


def finish(recipe: Recipe) -> None:
    """What both launchers do alike, after what a student's inputs are."""
    spread_base(recipe)
    for option in ("model_path", "generator_model_path"):
        other = recipe.staged.get(option)
        if other is not None and other != recipe.staged.get("base"):
            recipe.refuse(option, "its code loads pretrained_model_name_or_path in its place: make them the same")
    check_models(recipe)
    said = {line.option for line in recipe.lines}
    needed = [recipe.aliases.get(option, option) for option in NEEDED]
    recipe.refused += [f"{name}: the file leaves it out, and its code needs it" for name in needed if name not in said]
    batch(recipe)
    shift_of(recipe)
    if recipe.get(f"{CRITIC}.optimizer.lr") is None:
        recipe.set(f"{CRITIC}.optimizer.lr", recipe.get(f"{STUDENT}.optimizer.lr"))
    if not recipe.staged.get("use_ema"):
        recipe.set("ema.decay", None)
        recipe.drop("ema.start")
        recipe.notes["ema.decay"] = "its code keeps an average all the same, and without use_ema shows it nowhere"
    elif recipe.get("ema.decay") == 0:
        recipe.set("ema.decay", None)
    curves(recipe, counts_iterations=recipe.get("rollout.kind") != "self_forcing")
    phase(recipe)
    sparse(recipe)
    adapters(recipe)
    finish_data(recipe)


def finish_dmd(recipe: Recipe) -> None:
    stored, simulated = recipe.staged.get("stored"), recipe.staged.get("simulated")
    if simulated:
        recipe.set("rollout.kind", "backward_simulation")
        recipe.notes["data.latents"] = "its data_path holds stored embeddings of prompts: give data.prompts"
    elif stored is None:
        recipe.refused.append("data_path: without simulate_generator_forward the student starts from videos: name them")
    else:
        recipe.set("rollout.kind", "noised_data")
        recipe.values["data"] |= {"real": True, "latents": stored}
    finish(recipe)


def finish_self_forcing(recipe: Recipe) -> None:
    frames = recipe.staged.get("size", {}).get("frames", JUDGED)
    recipe.set("rollout.kind", "self_forcing")
    if frames < JUDGED:
        recipe.refuse("num_latent_t", f"its rollouts have at least {JUDGED} latent frames")
    if frames > JUDGED:
        recipe.set("rollout.num_training_frames", frames)
    put_sizes(recipe, "size", frames=JUDGED)
    finish(recipe)


def is_causal(options: Mapping[str, Any]) -> bool:
    """Whether options are of the launcher of causal students. Without the program nobody knows what is trained."""
    return options.get("program") == SELF_FORCING


CAUSAL = Dialect(
    "fastvideo, causal students", SELF_FORCING_RULES,
    {**COMMON_DEFAULTS, "dfake_gen_update_ratio": 5, "num_frame_per_block": 3, "independent_first_frame": False,
     "same_step_across_blocks": False, "last_step_only": False, "context_noise": 0,
     "simulate_generator_forward": False},
    START, finish_self_forcing, fits=is_causal,
)  # fmt: skip
BIDIRECTIONAL = Dialect(
    "fastvideo", DMD_RULES,
    {**COMMON_DEFAULTS, "generator_update_interval": 5, "simulate_generator_forward": False},
    START, finish_dmd,
)  # fmt: skip
