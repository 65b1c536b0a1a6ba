"""FastVideo's launchers with `--config FILE`: the options of `fastvideo.py` in sections `engine`, `pipeline` and
`training`. Read in hao-ai-lab/FastVideo, `fastvideo/api/training_schema.py` at 0bcd15d5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from importers.dialects.fastvideo import BIDIRECTIONAL, CAUSAL
from importers.recipe import Dialect
from importers.rules import LOGGING, SPEED, VALIDATING, harmless

SECTIONS = {
    "engine.parallelism.": ("tp_size", "sp_size", "hsdp_replicate_dim", "hsdp_shard_dim"),
    "engine.": ("num_gpus",),
    "engine.quantization.": ("transformer_quant",),
    "pipeline.": ("flow_shift", "dmd_denoising_steps", "boundary_ratio"),
    "pipeline.components.": ("override_transformer_cls_name",),
    "training.data.": (
        "data_path", "train_batch_size", "dataloader_num_workers", "num_latent_t", "num_height", "num_width",
        "num_frames", "seed", "training_cfg_rate",
    ),
    "training.optimizer.": (
        "learning_rate", "betas", "weight_decay", "lr_scheduler", "lr_warmup_steps", "max_grad_norm",
    ),
    "training.loop.": ("max_train_steps", "gradient_accumulation_steps"),
    "training.checkpoint.": (
        "output_dir", "training_state_checkpointing_steps", "weight_only_checkpointing_steps",
        "checkpoints_total_limit", "resume_from_checkpoint",
    ),
    "training.distillation.": (
        "real_score_model_path", "fake_score_model_path", "generator_update_interval", "min_timestep_ratio",
        "max_timestep_ratio", "real_score_guidance_scale", "fake_score_learning_rate", "fake_score_lr_scheduler",
        "fake_score_betas", "simulate_generator_forward", "warp_denoising_step",
    ),
    "training.self_forcing.": (
        "dfake_gen_update_ratio", "num_frame_per_block", "independent_first_frame", "same_step_across_blocks",
        "last_step_only", "context_noise",
    ),
    "training.model.": (
        "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs",
        "enable_gradient_checkpointing_type",
    ),
}  # fmt: skip
# what has another name there: its name in sections, and the option's
RENAMED = {
    "model_path": "pretrained_model_name_or_path",
    "engine.attention.vsa_sparsity": "VSA_sparsity",
    "engine.precision.dit": "dit_precision",
    "engine.precision.vae": "vae_precision",
    "pipeline.components.transformer_weights": "init_weights_from_safetensors",
    "pipeline.components.transformer_2_weights": "init_weights_from_safetensors_2",
    "training.ema.enabled": "use_ema",
    "training.ema.decay": "ema_decay",
    "training.ema.start_step": "ema_start_step",
    "training.lora.enabled": "lora_training",
    "training.lora.rank": "lora_rank",
    "training.lora.alpha": "lora_alpha",
    "training.lora.target_modules": "lora_target_modules",
    "training.vsa.decay_rate": "VSA_decay_rate",
    "training.vsa.decay_interval_steps": "VSA_decay_interval_steps",
    "training.vsa.cache_tile_buf": "VSA_cache_tile_buf",
}
NAMES = {**{f"{section}{name}": name for section, names in SECTIONS.items() for name in names}, **RENAMED}
BESIDE = ("program", "env.FASTVIDEO_ATTENTION_BACKEND")  # what a script says of it


def nested(flat: Dialect, name: str, fits: Any) -> Dialect:
    """The table of flat options under the names of the sections."""
    theirs = {option: section for section, option in NAMES.items()}
    rules = {section: flat.rules[option] for section, option in NAMES.items() if option in flat.rules}
    rules |= {option: flat.rules[option] for option in BESIDE}
    rules |= harmless("the launcher sets it", "mode") | harmless("the file that is read", "config")
    rules |= harmless(SPEED, "engine.offload.*", "engine.compile*")
    rules |= harmless(LOGGING, "training.tracker.*") | harmless(VALIDATING, "training.validation.*")
    defaults = {theirs[option]: value for option, value in flat.defaults.items() if option in theirs}
    return Dialect(name, rules, defaults, flat.start, flat.finish, fits=fits, aliases=theirs)


def is_nested(options: Mapping[str, Any]) -> bool:
    return any(name.startswith(("training.", "engine.")) for name in options)


def is_nested_causal(options: Mapping[str, Any]) -> bool:
    flat = {NAMES.get(name, name): value for name, value in options.items()}
    return is_nested(options) and CAUSAL.fits(flat)


NESTED_CAUSAL = nested(CAUSAL, "fastvideo, --config, causal students", is_nested_causal)
NESTED = nested(BIDIRECTIONAL, "fastvideo, --config", is_nested)
