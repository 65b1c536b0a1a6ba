"""FastVideo's modular trainer: YAML with `models`, `method`, `training`, `callbacks` and `pipeline`.

Read in hao-ai-lab/FastVideo, `fastvideo/train/**`: configs at 00e61a50, `dmd2.py` at b2b7de39 and 038384e1,
`self_forcing.py` at 2b434bdc. Guidance is uncond + w (cond - uncond), as here; the launchers of `fastvideo.py` have
w - 1. Its DMD2Method exists in three generations under one name. The second is taken (038384e1), whose critic learns
from the student's own sample where both are trained. Options that only the third has are not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from importers.data import finish_data, put_sizes
from importers.dialects.fastvideo_parts import batch, check_models, curves, phase, ratio, shift_of, single
from importers.lora import FASTVIDEO_DEFAULT, adapter_keys, fastvideo_targets, names_of, put_adapter
from importers.networks import NETWORKS, model, weights
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
    positive,
    real,
    refused,
    stage,
    steps,
    to,
    truth,
    whole,
)

GLOBAL = "training.global_batch_size"
ZEROED = "it zeroes text embeddings; here a dropped prompt is the negative one"
CLIPPED = (f"{STUDENT}.optimizer.clip_norm", f"{CRITIC}.optimizer.clip_norm")
METHODS = {"DMD2Method": "dmd", "SelfForcingMethod": "self_forcing"}
MODELS = {"WanModel": False, "WanCausalModel": True}
ROLLOUTS = {"simulate": "backward_simulation", "sim": "backward_simulation", "data_latent": "noised_data",
            "data": "noised_data", "vae_latent": "noised_data"}  # fmt: skip


def method(recipe: Recipe, value: Any) -> None:
    if (name := str(value).rpartition(".")[2]) not in METHODS:
        raise Untranslated(f"only {' and '.join(METHODS)} are carried over")
    recipe.staged["method"] = METHODS[name]


def network(recipe: Recipe, role: str, value: Any) -> None:
    if (name := str(value).rpartition(".")[2]) not in MODELS:
        raise Untranslated(f"only {' and '.join(MODELS)} are carried over")
    if MODELS[name] and role != "student":
        raise Untranslated("a causal teacher or critic is none of our distillation's")
    if role == "student":
        recipe.staged["causal"] = MODELS[name]


def role_rules(role: str) -> dict[str, Rule]:
    trained = role != "teacher"
    keys = adapter_keys(role)
    rules = {
        "_target_": Rule((f"{role}.preset",), lambda r, v: network(r, role, v)),
        "init_from": model(role),
        "trainable": must_be(trained),
        "flow_shift": stage("step_shift", real, "schedule.timestep_shift") if role == "student" else Rule(
            (), lambda r, v: None, "of the student's steps alone"),
        "attention_backend": must_be(None, "FLASH_ATTN", "TORCH_SDPA", why="dense attention is carried over"),
        "disable_custom_init_weights": Rule((), lambda r, v: None, "it counts with other weights of the student alone"),
        "enable_gradient_checkpointing_type": checkpointing,
        "lora.enable": stage(f"{role}_lora", truth, *keys) if trained else must_be(False),
    }  # fmt: skip
    if trained:
        rules |= {
            "lora.rank": stage(f"{role}_rank", positive, *keys),
            "lora.alpha": stage(f"{role}_alpha", optional, *keys),
            "lora.target_modules": stage(f"{role}_names", names_of, *keys),
        }
    if role == "student":
        rules |= {
            "transformer_override_safetensor": weights("student"),
            "num_frames_per_block": stage("block", positive, "causal.num_frame_per_block"),
        }
    return {f"models.{role}.{name}": rule for name, rule in rules.items()}


def sampled(recipe: Recipe, value: Any) -> None:
    if value not in ROLLOUTS:
        raise Untranslated(f"only {', '.join(ROLLOUTS)} are carried over")
    recipe.staged["rollout"] = ROLLOUTS[value]


def size(key: str, name: str = "pixels") -> Rule:
    return Rule((f"data.wan.{key}",), lambda r, v: put_sizes(r, name, **{key: positive(v)}) if v else None)


def clip(recipe: Recipe, value: Any) -> None:
    for section in (STUDENT, CRITIC):
        recipe.set(f"{section}.optimizer.clip_norm", real(value) or None)


def window(recipe: Recipe, value: Any) -> None:
    recipe.set("causal.window_frames", None if integer(value) == -1 else integer(value))


T, P, M = "training.", "pipeline.", "method."
RULES: dict[str, Rule] = {
    **{name: rule for role in NETWORKS for name, rule in role_rules(role).items()},
    f"{M}_target_": Rule(("objective.kind", "rollout.kind"), method),
    f"{M}rollout_mode": Rule(("rollout.kind",), sampled),
    f"{M}dmd_denoising_steps": steps("schedule.denoising_step_list"),
    f"{M}warp_denoising_step": flag("schedule.warp_denoising_step"),
    f"{M}generator_update_interval": to("training.generator_update_interval", lambda v: max(integer(v), 1)),
    f"{M}real_score_guidance_scale": number("objective.real_guidance_scale"),
    f"{M}min_timestep_ratio": to("schedule.min_sigma", ratio),
    f"{M}max_timestep_ratio": to("schedule.max_sigma", ratio),
    f"{M}fake_score_learning_rate": number(f"{CRITIC}.optimizer.lr"),
    f"{M}fake_score_betas": betas(CRITIC),
    f"{M}fake_score_lr_scheduler": stage("critic_curve", str, f"{CRITIC}.lr_schedule.kind"),
    f"{M}cfg_uncond.text": must_be("negative_prompt", why="what guidance leads away from is data.negative_prompt"),
    f"{M}cfg_uncond.on_missing": Rule((), lambda r, v: None, "the prompt is always there"),
    f"{M}chunk_size": count("causal.num_frame_per_block"),
    f"{M}student_sample_type": must_be("sde", why="a step's noise is drawn anew here"),
    f"{M}same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    f"{M}last_step_only": flag("rollout.last_step_only"),
    f"{M}context_noise": number("causal.context_noise"),
    f"{M}enable_gradient_in_rollout": must_be(True),
    f"{M}start_gradient_frame": must_be(0),
    f"{M}gradient_block_mode": must_be("all"),
    f"{T}distributed.num_gpus": stage("num_gpus", positive, GLOBAL),
    f"{T}distributed.sp_size": stage("sp_size", positive, "parallel.sequence", GLOBAL),
    f"{T}distributed.hsdp_replicate_dim": stage("replicate", positive, "parallel.replicate", GLOBAL),
    f"{T}distributed.hsdp_shard_dim": stage("shard", positive, "parallel.shard", GLOBAL),
    f"{T}distributed.tp_size": must_be(1),
    f"{T}distributed.reduce_dtype": must_be("fp32", "float32"),
    f"{T}data.data_path": stage("stored", lambda value: value, "data.latents"),
    f"{T}data.preprocessed_data_type": must_be("t2v", "text_only", why="the rollout says what is read"),
    f"{T}data.train_batch_size": to("training.micro_batch_size", single),
    f"{T}data.training_cfg_rate": must_be(0.0, why=ZEROED),
    f"{T}data.seed": whole("seed"),
    f"{T}data.num_latent_t": size("frames", "size"),
    f"{T}data.num_height": size("height"),
    f"{T}data.num_width": size("width"),
    f"{T}optimizer.learning_rate": number(f"{STUDENT}.optimizer.lr"),
    f"{T}optimizer.betas": betas(STUDENT),
    f"{T}optimizer.weight_decay": both("weight_decay"),
    f"{T}optimizer.lr_scheduler": stage("curve", str, f"{STUDENT}.lr_schedule.kind"),
    f"{T}optimizer.lr_warmup_steps": stage("warmup", integer, f"{STUDENT}.lr_schedule.warmup_steps",
                                          f"{CRITIC}.lr_schedule.warmup_steps"),
    f"{T}optimizer.max_grad_norm": refused("its code clips by the callback grad_clip alone: say it there"),
    f"{T}loop.max_train_steps": count("training.max_steps"),
    f"{T}loop.gradient_accumulation_steps": stage("accumulation", lambda v: integer(v) or 1, GLOBAL),
    f"{T}checkpoint.resume_from_checkpoint": must_be("", None, "latest", why="a run of theirs cannot be resumed here"),
    f"{T}checkpoint.training_state_checkpointing_steps": to("checkpoint.every", lambda v: integer(v) or 100),
    f"{T}checkpoint.checkpoints_total_limit": to("checkpoint.keep_last", lambda v: integer(v) or 2),
    f"{T}vsa.sparsity": must_be(0.0, why="whether its ramp is read differs by commit: set student.sparse by hand"),
    f"{T}vsa.decay_rate": must_be(0.0),
    f"{T}vsa.decay_interval_steps": must_be(0, 1),
    f"{T}model.moba_config": refused("VMoBA is none of ours"),
    f"{T}model.enable_gradient_checkpointing_type": checkpointing,
    f"{T}dit_precision": must_be("fp32"),
    f"{T}model_path": stage("model_path", str, "data.text.encoder", "data.vae.path"),
    f"{P}flow_shift": stage("shift", real, "schedule.score_timestep_shift"),
    f"{P}dit_config.local_attn_size": Rule(("causal.window_frames",), window),
    f"{P}dit_config.sink_size": whole("causal.sink_frames"),
    "callbacks.grad_clip.max_grad_norm": Rule(CLIPPED, clip),
    "callbacks.ema.decay": number("ema.decay"),
    "callbacks.ema.start_iter": whole("ema.start"),
    **harmless("which callback it is", "callbacks.grad_clip", "callbacks.ema", "callbacks.grad_clip._target_",
               "callbacks.ema._target_", "callbacks.validation._target_"),
    **harmless(LOGGING, f"{T}tracker.*", f"{T}checkpoint.output_dir", "callbacks.grad_clip.log_grad_norms",
               "callbacks.latent_vis.*"),
    **harmless(SPEED, f"{T}data.dataloader_num_workers", f"{T}distributed.pin_cpu_memory",
               f"{T}distributed.reshard_after_forward", f"{T}distributed.fsdp_symmetric_memory",
               f"{T}distributed.fsdp_modules_per_group", f"{T}optimizer.fused", f"{T}vsa.cache_tile_buf",
               f"{T}model.enable_torch_compile", f"{P}dit_config.pack_attention_projections"),
    **harmless(VALIDATING, "callbacks.validation.*", f"{T}data.num_frames", f"{P}dmd_sample_type",
               f"{P}dmd_denoising_steps", f"{P}dmd_denoising_steps_are_scheduler_space", f"{P}sampler_kind",
               f"{P}vae_*", f"{P}text_encoder_*"),
    **harmless(UNREAD, f"{T}model.weighting_scheme", f"{T}model.logit_mean", f"{T}model.logit_std",
               f"{T}model.mode_scale", f"{T}model.precondition_outputs", f"{T}optimizer.lr_num_cycles",
               f"{T}optimizer.lr_power", f"{T}optimizer.min_lr_ratio"),
}  # fmt: skip
DEFAULTS = {
    "models.student.flow_shift": 3.0, f"{M}warp_denoising_step": False, f"{M}generator_update_interval": 1,
    f"{M}real_score_guidance_scale": 1.0, f"{M}min_timestep_ratio": 0.0, f"{M}max_timestep_ratio": 1.0,
    f"{T}distributed.num_gpus": 1, f"{T}distributed.hsdp_replicate_dim": 1, f"{T}data.train_batch_size": 1,
    f"{T}data.seed": 0, f"{T}optimizer.betas": [0.9, 0.999], f"{T}optimizer.weight_decay": 0.0,
    f"{T}optimizer.lr_scheduler": "constant", f"{T}optimizer.lr_warmup_steps": 0,
    f"{T}loop.gradient_accumulation_steps": 1,
}  # fmt: skip
OF_SELF_FORCING = {"chunk_size": 3, "same_step_across_blocks": False, "last_step_only": False, "context_noise": 0.0}


def finish(recipe: Recipe) -> None:
    staged = recipe.staged
    kind = staged.get("method")
    if kind is None:
        recipe.refused.append("method._target_: the file names no method that is carried over")
        return
    recipe.staged["base"] = staged.get("model_path") or recipe.get("student.init")
    _inputs(recipe, kind)
    _ranks(recipe)
    if kind == "self_forcing":
        staged.pop("step_shift", None)
        recipe.notes["schedule.timestep_shift"] = "pipeline.flow_shift, by which its self-forcing warps steps too"
        for key in ("schedule.min_sigma", "schedule.max_sigma"):
            recipe.set(key, 0.0 if key.endswith("min_sigma") else 1.0)
            recipe.notes[key] = "its self-forcing takes no ratio: levels of 0 to 1"
    shift_of(recipe)
    curves(recipe, counts_iterations=False)
    check_models(recipe)
    for section in (STUDENT, CRITIC):
        if "clip_norm" not in recipe.get(f"{section}.optimizer"):
            recipe.set(f"{section}.optimizer.clip_norm", 1.0 if _has(recipe, "grad_clip") else None)
    _average(recipe)
    phase(recipe)
    _adapters(recipe)
    finish_data(recipe)


def _inputs(recipe: Recipe, kind: str) -> None:
    """Where the student's samples come from. A causal student is the self-forcing's, and that one's alone."""
    staged = recipe.staged
    if bool(staged.get("causal")) != (kind == "self_forcing"):
        recipe.refuse("models.student._target_", "SelfForcingMethod takes a WanCausalModel, and DMD2Method a WanModel")
    rollout = staged.get("rollout")
    if kind == "self_forcing":
        if rollout != "backward_simulation":
            recipe.refuse("method.rollout_mode", "its self-forcing simulates its inputs")
        recipe.set("rollout.kind", "self_forcing")
        recipe.set("rollout.reuse_rollout", False)
        for key, value in OF_SELF_FORCING.items():
            section = "causal" if key in ("chunk_size", "context_noise") else "rollout"
            path = f"{section}.{'num_frame_per_block' if key == 'chunk_size' else key}"
            if recipe.get(path) is None:
                recipe.set(path, value)
        block, frames = recipe.get("causal.num_frame_per_block"), staged.get("size", {}).get("frames")
        if staged.get("block", block) != block:
            recipe.refuse("models.student.num_frames_per_block", f"method.chunk_size is {block}: make them the same")
        if frames and frames % block:
            recipe.refuse("training.data.num_latent_t", f"{frames} are not whole blocks of {block}")
        return
    recipe.set("rollout.kind", rollout)
    recipe.notes["rollout.reuse_rollout"] = (
        "as DMD2Method has it at 038384e1; before, its critic made a rollout of its own"
    )
    if rollout is None:
        recipe.refused.append("method.rollout_mode: the file does not say where the student's samples come from")
    if rollout == "noised_data":
        stored = staged.get("stored")
        if not isinstance(stored, str):
            recipe.refuse("training.data.data_path", "one folder of latents can be carried over")
        recipe.values["data"] |= {"real": True, "latents": stored}


def _ranks(recipe: Recipe) -> None:
    """sp_size and hsdp_shard_dim are num_gpus where they are left out."""
    gpus = recipe.staged.get("num_gpus", 1)
    recipe.set("parallel.sequence", recipe.staged.get("sp_size", gpus))
    recipe.staged.setdefault("shard", gpus)
    batch(recipe)


def _has(recipe: Recipe, callback: str) -> bool:
    """Whether the file has a section of this callback, which then acts by its defaults."""
    return any(line.option.startswith(f"callbacks.{callback}") for line in recipe.lines)


def _average(recipe: Recipe) -> None:
    """Its average follows every iteration, those of the critic alone too: N of its steps are one update of ours."""
    interval, decay = recipe.get("training.generator_update_interval") or 1, recipe.get("ema.decay")
    if decay is None and _has(recipe, "ema"):
        decay = 0.9999
    recipe.set("ema.decay", decay)
    if decay is not None and interval > 1:
        recipe.set("ema.decay", math.pow(decay, interval))
        recipe.notes["ema.decay"] = f"{decay} to the power of {interval}, as its average follows every iteration"


def _adapters(recipe: Recipe) -> None:
    staged = recipe.staged
    for role in ("student", "critic"):
        if not staged.get(f"{role}_lora"):
            continue
        if f"{role}_rank" not in staged:
            recipe.refuse(f"models.{role}.lora.enable", "it needs a rank")
            continue
        names = staged.get(f"{role}_names", FASTVIDEO_DEFAULT)
        try:
            targets = fastvideo_targets(names, has_image=recipe.get("student.preset") == "i2v-14b")
        except Untranslated as problem:
            recipe.refuse(f"models.{role}.lora.target_modules", str(problem))
            continue
        alpha = staged.get(f"{role}_alpha")
        put_adapter(recipe, role, staged[f"{role}_rank"], None if alpha is None else float(alpha), targets)


def is_modular(options: Mapping[str, Any]) -> bool:
    return any(name.startswith(("method.", "models.")) for name in options)


MODULAR = Dialect(
    "fastvideo, modular", RULES, DEFAULTS,
    {
        "trainer": "score_distillation",
        **{name: {} for name in NETWORKS},
        "data": {"kind": "wan", "real": False},
        "objective.kind": "dmd",
        "rollout": {"reuse_rollout": True},
        "training.precision": "bf16",
        f"{STUDENT}.optimizer": {"kind": "adamw"},
        f"{CRITIC}.optimizer": {"kind": "adamw"},
        "ema": {},
    },
    finish, fits=is_modular,
)  # fmt: skip
