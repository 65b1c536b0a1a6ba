"""LongLive 2: YAML in sections `algorithm`, `training`, `model_kwargs`, `data`, `inference`.

Read in NVlabs/LongLive, `train_dmd.yaml` at 6e66269c, and in a copy of its `train_ar.yaml` (yyang181/LongLive at
708f9786). Its DMD has a causal teacher and a causal critic, a normaliser for each block and sinks for each shot. Its
first stage puts the model's own errors into its context. Nothing here does these, so every recipe is refused;
`--check` shows what its options are here.
"""

from __future__ import annotations

from typing import Any

from importers.data import finish_data, put_sizes
from importers.dialects.longlive import ADAPTER, put_adapters
from importers.networks import NETWORKS, put_model, weights
from importers.recipe import Dialect, Recipe, Rule
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
    later,
    must_be,
    number,
    one_of,
    plus_one,
    positive,
    precision,
    refused,
    stage,
    to,
    whole,
)

A, T = "algorithm.", "training."
SIZES = ("data.wan.frames", "data.wan.height", "data.wan.width")


def shape(recipe: Recipe, value: Any) -> None:
    """[B, F, C, H, W] of latents."""
    _, frames, _, height, width = map(integer, value)
    put_sizes(recipe, "size", frames=frames, height=height, width=width)


def window(recipe: Recipe, value: Any) -> None:
    recipe.set("causal.window_frames", None if integer(value) == -1 else integer(value))


RULES: dict[str, Rule] = {
    **ADAPTER,
    "model_kwargs.model_name": stage("model", str, *(f"{name}.init" for name in NETWORKS)),
    "model_kwargs.timestep_shift": number("schedule.timestep_shift"),
    "model_kwargs.num_frame_per_block": count("causal.num_frame_per_block"),
    "model_kwargs.local_attn_size": Rule(("causal.window_frames",), window),
    "checkpoints.generator_ckpt": weights("student"),
    "checkpoints.real_score_ckpt": weights("teacher"),
    "checkpoints.fake_score_ckpt": weights("critic"),
    f"{A}trainer": one_of("trainer", {"score_distillation": "score_distillation"}),
    f"{A}distribution_loss": one_of("objective.kind", {"dmd": "dmd"}),
    f"{A}all_causal": refused("a causal teacher and a causal critic are none of our distillation's"),
    f"{A}ts_schedule": flag("schedule.ts_schedule"),
    f"{A}real_guidance_scale": plus_one("objective.real_guidance_scale"),
    f"{A}fake_guidance_scale": plus_one("objective.fake_guidance_scale"),
    f"{A}num_train_timestep": must_be(1000),
    f"{A}denoising_loss_type": one_of("objective.critic_loss", {"flow": "flow"}),
    f"{T}lr": number(f"{STUDENT}.optimizer.lr"),
    f"{T}lr_critic": number(f"{CRITIC}.optimizer.lr"),
    f"{T}weight_decay": both("weight_decay"),
    f"{T}beta1": beta(STUDENT, 0),
    f"{T}beta2": beta(STUDENT, 1),
    f"{T}beta1_critic": beta(CRITIC, 0),
    f"{T}beta2_critic": beta(CRITIC, 1),
    f"{T}batch_size": count("training.micro_batch_size"),
    f"{T}gradient_accumulation_steps": stage("accumulation", positive, "training.global_batch_size"),
    f"{T}ema_weight": to("ema.decay", lambda value: float(value) or None),
    f"{T}ema_start_step": whole("ema.start"),
    f"{T}log_iters": count("checkpoint.every"),
    f"{T}max_checkpoints": to("checkpoint.keep_last", lambda value: min(integer(value), 10**6)),
    f"{T}max_iters": to("training.max_steps", lambda value: min(integer(value), 10**9)),
    f"{T}dfake_gen_update_ratio": count("training.generator_update_interval"),
    f"{T}num_training_frames": count("rollout.num_training_frames"),
    f"{T}min_num_training_frames": Rule((), lambda recipe, value: None, "the least of a drawn length"),
    f"{T}slice_last_frames": Rule((), lambda recipe, value: None, "the frames that its losses see"),
    f"{T}error_recycling.enabled": refused("its own errors put into the context are none of ours"),
    "data.data_path": stage("stored", str, "data.prompts"),
    "data.image_or_video_shape": Rule(SIZES, shape),
    "data.load_raw_video": refused("its first stage encodes videos as it trains: preprocess.py video makes latents"),
    "inference.sampling_steps": Rule((), lambda recipe, value: None, "evenly spaced steps, not a list"),
    "inference.sink_size": whole("causal.sink_frames"),
    "inference.multi_shot_sink": refused("sinks of a shot are none of ours"),
    "inference.multi_shot_rope_offset": refused("an offset of a shot is none of ours"),
    "infra.mixed_precision": precision,
    "infra.gradient_checkpointing": checkpointing,
    "infra.*quant*": later("arithmetic in NVFP4"),
    "infra.sequence_parallel_size": count("parallel.sequence"),
    "logging.seed": whole("seed"),
    **harmless("of its first stage", f"{A}causal", f"{A}teacher_forcing", f"{T}error_recycling.*",
               "inference.guidance_scale", "inference.negative_prompt", "infra.vae_halo_latents"),
    **harmless(SPEED, "infra.sharding_strategy", "infra.generator_fsdp_wrap_strategy",
               "infra.real_score_fsdp_wrap_strategy", "infra.fake_score_fsdp_wrap_strategy",
               "infra.text_encoder_fsdp_wrap_strategy", f"{T}gc_interval"),
    **harmless(LOGGING, "logging.wandb_key", "logging.wandb_entity", "logging.wandb_project"),
    **harmless(VALIDATING, "evaluation.*", "data.eval_data_path"),
    **harmless(UNREAD, "model_kwargs.model_type"),
}  # fmt: skip


def finish(recipe: Recipe) -> None:
    """What its options are here, and why a run of them would be another method's."""
    staged = recipe.staged
    for name in NETWORKS:
        put_model(recipe, name, str(staged.get("model") or "Wan2.2-TI2V-5B"))
    put_adapters(recipe)
    finish_data(recipe)
    recipe.refused.append(
        "LongLive 2: its DMD normalises each block, samples evenly spaced steps and pins a sink for each shot, and its "
        "first stage recycles errors: none of these is ours"
    )


DIALECT = Dialect(
    "longlive2", RULES, {},
    {
        "trainer": "score_distillation",
        "data": {"kind": "wan", "real": False},
        "rollout.kind": "self_forcing",
        f"{STUDENT}.optimizer": {"kind": "adamw"},
        f"{CRITIC}.optimizer": {"kind": "adamw"},
    },
    finish,
)  # fmt: skip
