"""FastGen: Python configs `config_*.py`, read as syntax, and command lines with `key=value` words.

Read in NVlabs/FastGen, `fastgen/methods/distribution_matching/{dmd2,self_forcing}.py` at a6b24978 and f7d84562,
`fastgen/networks/noise_schedule.py` at 2a1a495f, `fastgen/configs/net.py` at 060b8570, and in copies of it
`fastgen/configs/{config,opt,callbacks}.py`, `methods/config_{dmd2,self_forcing}.py` and `fastgen/trainer.py`. Guidance
is w. Student and critic take turns: iterations count from 1, and each N-th is the student's. Only the student's
gradients are clipped. The heads that its Wan recipes judge with are none of ours yet, so a recipe with a discriminator
is refused.
"""

from __future__ import annotations

from typing import Any

from importers.data import finish_data, put_sizes
from importers.networks import NETWORKS, put_model, weights
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    SPEED,
    STUDENT,
    VALIDATING,
    betas,
    count,
    flag,
    harmless,
    integer,
    listed,
    must_be,
    number,
    one_of,
    positive,
    real,
    refused,
    stage,
    to,
    whole,
)

M, T = "model.", "trainer."
METHODS = {"config_dmd2": "dmd", "config_self_forcing": "self_forcing"}
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
# networks of fastgen/configs/net.py: what they load, and whether they are causal
NETS = {
    "Wan_1_3B_Config": (WAN, False),
    "Wan22_T2V_5B_Config": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", False),
    "Wan21_T2V_14B_Config": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", False),
    "CausalWan_1_3B_Config": (WAN, True),
    "CausalWan_14B_Config": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", True),
}
SIZES = ("data.wan.frames", "data.wan.height", "data.wan.width")
SCORES = ("schedule.score_timestep_shift", "schedule.min_score_timestep", "schedule.max_score_timestep",
          "schedule.min_sigma", "schedule.max_sigma")  # fmt: skip
JUDGED = "of the discriminator, which counts with gan_loss_weight_gen"


def method(recipe: Recipe, value: Any) -> None:
    name = str(value).removesuffix("_default")
    if name in ("config_f_distill", "config_ladd"):
        raise Untranslated("the heads of its discriminator: a later version will support them")
    if name not in METHODS:
        raise Untranslated(f"only {' and '.join(METHODS)} are carried over")
    recipe.staged["method"] = METHODS[name]


def net(role: str) -> Rule:
    def carry(recipe: Recipe, value: Any) -> None:
        if value not in NETS:
            raise Untranslated(f"only {', '.join(NETS)} are carried over")
        recipe.staged[role] = NETS[value]

    return Rule((f"{role}.preset", f"{role}.init"), carry)


def optimizer(name: str, section: str) -> dict[str, Rule]:
    rules = {
        "lr": number(f"{section}.optimizer.lr"),
        "betas": betas(section),
        "weight_decay": number(f"{section}.optimizer.weight_decay"),
        "eps": number(f"{section}.optimizer.eps"),
        "optim_type": one_of(f"{section}.optimizer.kind", {"adamw": "adamw"}),
        **harmless(SPEED, "fused"),
    }
    return {f"{M}{name}_optimizer.{key}": rule for key, rule in rules.items()}


def warmup(section: str) -> Rule:
    return to(f"{section}.lr_schedule.warmup_steps", lambda value: integer(listed(value)[0]),
              "its rate starts at 1e-6 of the peak")  # fmt: skip


def shape(recipe: Recipe, value: Any) -> None:
    """[C, F, H, W] of latents."""
    _, frames, height, width = map(integer, value)
    put_sizes(recipe, "size", frames=frames, height=height, width=width)


def levels(value: Any) -> list[float]:
    found = [round(real(level) * 1000, 6) for level in value]
    if found[-1] != 0:
        raise ValueError("a list that ends in 0")
    return found[:-1]


def few(value: Any) -> int:
    if (number := positive(value)) > 1000:
        raise ValueError("at most 1000")
    return number


def density(recipe: Recipe, value: Any) -> None:
    if value not in ("shifted", "uniform"):
        raise Untranslated("only shifted and uniform levels can be drawn here")
    recipe.staged["density"] = value


RULES: dict[str, Rule] = {
    "method": Rule(("objective.kind", "rollout.kind"), method),
    f"{M}net": net("student"),
    f"{M}teacher": net("teacher"),
    f"{M}net.chunk_size": count("causal.num_frame_per_block"),
    **optimizer("net", STUDENT),
    **optimizer("fake_score", CRITIC),
    f"{M}net_scheduler.warm_up_steps": warmup(STUDENT),
    f"{M}fake_score_scheduler.warm_up_steps": warmup(CRITIC),
    f"{M}guidance_scale": to("objective.real_guidance_scale", lambda value: 1.0 if value is None else real(value)),
    f"{M}skip_layers": refused("guidance by skipped layers is none of ours"),
    f"{M}fake_score_net": refused("a critic of another geometry than the teacher's is not carried over"),
    f"{M}fake_score_sample_t_cfg": refused("the critic's levels are drawn as the student's here"),
    f"{M}fake_score_pred_type": one_of("objective.critic_loss", {None: "flow", "flow": "flow", "x0": "x0"}),
    f"{M}gan_loss_weight_gen": must_be(
        0.0, why="the heads of its discriminator: a later version will support them; 0 is DMD alone"
    ),
    f"{M}student_update_freq": count("training.generator_update_interval"),
    f"{M}student_sample_steps": stage("steps", few, "schedule.denoising_step_list"),
    f"{M}student_sample_type": must_be("sde", why="a step's noise is drawn anew here"),
    f"{M}sample_t_cfg.time_dist_type": Rule(SCORES, density),
    f"{M}sample_t_cfg.shift": stage("shift", real, *SCORES),
    f"{M}sample_t_cfg.min_t": stage("low", real, *SCORES),
    f"{M}sample_t_cfg.max_t": stage("high", real, *SCORES),
    f"{M}sample_t_cfg.t_list": to("schedule.denoising_step_list", levels, "levels of 0..1, times 1000"),
    f"{M}precision": one_of("training.precision", {"bfloat16": "bf16", "float32": "fp32"}),
    f"{M}precision_fsdp": stage("stored", str, "training.precision"),
    f"{M}precision_amp": must_be(None, "bfloat16"),
    f"{M}input_shape": Rule(SIZES, shape),
    f"{M}use_ema": must_be(False, why="which iterations its average follows was not read: set our ema by hand"),
    f"{M}load_student_weights": must_be(True),
    f"{M}pretrained_model_path": refused("name a network of configs/net.py, which loads its own weights"),
    f"{M}pretrained_student_net_path": weights("student"),
    f"{T}checkpointer.pretrained_ckpt_path": weights("student"),
    f"{M}same_step_across_blocks": flag("rollout.same_step_across_blocks"),
    f"{M}last_step_only": flag("rollout.last_step_only"),
    f"{M}context_noise": to("causal.context_noise", lambda value: real(value) * 1000, "a level of 0..1, times 1000"),
    f"{M}enable_gradient_in_rollout": must_be(True),
    f"{M}start_gradient_frame": must_be(0),
    f"{T}callbacks.grad_clip.grad_norm": number(f"{STUDENT}.optimizer.clip_norm"),
    f"{T}max_iter": to("training.max_steps", lambda value: positive(integer(value) - 1), "it counts from 1 up to it"),
    f"{T}save_ckpt_iter": count("checkpoint.every"),
    f"{T}seed": whole("seed"),
    f"{T}batch_size_global": to("training.global_batch_size", lambda value: None if value is None else integer(value)),
    f"{T}grad_accum_rounds": stage("accumulation", positive, "training.global_batch_size"),
    f"{T}augment_pipe": refused("augmentation is none of a distillation's here"),
    "dataloader_train.batch_size": count("training.micro_batch_size"),
    **harmless("its loader: data.latents or data.prompts", "dataloader_train", "dataloader_train.img_size",
               "dataloader_train.sequence_length", "dataloader_train.datatags", f"{M}enable_preprocessors"),
    **harmless("the frames of input_shape", f"{M}net.total_num_frames"),
    **harmless(JUDGED, f"{M}discriminator", f"{M}discriminator.*", f"{M}discriminator_optimizer.*",
               f"{M}discriminator_scheduler.*", f"{M}gan_use_same_t_noise", f"{M}gan_r1_reg_weight",
               f"{M}gan_r1_reg_alpha"),
    **harmless("of other densities", f"{M}sample_t_cfg.train_p_mean", f"{M}sample_t_cfg.train_p_std",
               f"{M}sample_t_cfg.log_t_df"),
    **harmless("of an average that use_ema asks for", f"{T}callbacks.ema.*"),
    **harmless(LOGGING, "log_config.*", f"{T}logging_iter", f"{T}checkpointer.save_dir", f"{T}callbacks.wandb.*"),
    **harmless("of the command", "program", "config"),
    **harmless(SPEED, f"{M}device", f"{M}fsdp_meta_init", f"{M}add_teacher_to_fsdp_dict",
               f"{M}ddp_find_unused_parameters", f"{M}grad_scaler_enabled", f"{M}net.disable_grad_ckpt",
               f"{M}net.disable_efficient_attn", f"{T}ddp", f"{T}fsdp", f"{T}fsdp_cpu_offload",
               f"{T}fsdp_min_num_params", f"{T}fsdp_sharding_group_size", f"{T}tf32_enabled", f"{T}cudnn.*",
               f"{T}offload_module_in_decoding", "dataloader_train.num_workers"),
    **harmless(VALIDATING, f"{T}validation_iter", f"{T}val_seed", f"{T}visualize_teacher", "eval.*",
               f"{M}precision_amp_infer", f"{M}precision_amp_enc", "dataloader_val", "dataloader_val.*"),
}  # fmt: skip
DEFAULTS = {
    **{f"{M}{name}_optimizer.{key}": value for name in ("net", "fake_score")
       for key, value in (("lr", 1e-4), ("betas", [0.9, 0.999]), ("weight_decay", 0.01), ("optim_type", "adamw"))},
    f"{M}guidance_scale": None, f"{M}fake_score_pred_type": None, f"{M}gan_loss_weight_gen": 0.001,
    f"{M}student_update_freq": 5,
    f"{M}sample_t_cfg.shift": 5.0, f"{M}sample_t_cfg.min_t": 0.002, f"{M}sample_t_cfg.max_t": 80.0,
    f"{M}precision": "float32", f"{T}callbacks.grad_clip.grad_norm": 10.0, f"{T}max_iter": 1000000,
    f"{T}save_ckpt_iter": 5000, f"{T}seed": 0, f"{M}use_ema": False,
}  # fmt: skip
METHOD_STEPS = {"dmd": 1, "self_forcing": 4}  # of a file without student_sample_steps
HIGHEST = 0.999  # level of its rectified flow's pure noise


def finish(recipe: Recipe) -> None:
    staged = recipe.staged
    kind = staged.get("method")
    if kind is None:
        recipe.refuse("method", f"only {' and '.join(METHODS)} are carried over")
        return
    _networks(recipe, causal=kind == "self_forcing")
    _steps(recipe, kind)
    _scores(recipe, kind)
    if recipe.get("training.precision") == "bf16" and staged.get("stored") != "float32":
        recipe.refuse(
            f"{M}precision",
            "weights and AdamW in bf16: a later version will support it; with precision_fsdp float32 it is bf16 here",
        )
    recipe.set(f"{CRITIC}.optimizer.clip_norm", None)
    recipe.notes[f"{CRITIC}.optimizer.clip_norm"] = "its callback clips the student alone"
    if recipe.get("training.global_batch_size") is None:
        recipe.drop("training.global_batch_size")
        rounds = staged.get("accumulation", 1)
        recipe.missing["training.global_batch_size"] = f"GPUs times dataloader_train.batch_size times {rounds}"
    recipe.set("training.critic_warmup_steps", recipe.get("training.generator_update_interval") - 1)
    recipe.notes["training.critic_warmup_steps"] = "the student's first turn is iteration N"
    recipe.set("ema.decay", None)
    finish_data(recipe)


def _networks(recipe: Recipe, *, causal: bool) -> None:
    """The critic is the teacher's copy, and the teacher the student's where none is named."""
    student = recipe.staged.get("student")
    if student is None:
        recipe.refused.append("model.net: the file names no network")
        return
    if student[1] != causal:
        recipe.refuse(f"{M}net", "config_self_forcing takes a causal network, and config_dmd2 another one")
    teacher = recipe.staged.get("teacher") or student
    if teacher[1]:
        recipe.refuse(f"{M}teacher", "its scores would be causal, for the teacher is the student's network or another "
                      "causal one: name a network like Wan_1_3B_Config")  # fmt: skip
    for role, (name, _) in zip(NETWORKS, (student, teacher, teacher), strict=True):
        put_model(recipe, role, name)
    if causal and recipe.get("causal.num_frame_per_block") is None:
        recipe.set("causal.num_frame_per_block", 3)


def _steps(recipe: Recipe, kind: str) -> None:
    """One step from noise, or a list; a bidirectional student of several steps starts from noised videos."""
    count, steps = recipe.staged.get("steps", METHOD_STEPS[kind]), recipe.get("schedule.denoising_step_list")
    if steps is None:
        steps = [HIGHEST * 1000 * (1 - i / count) for i in range(count)]
        recipe.set("schedule.denoising_step_list", steps)
        recipe.notes["schedule.denoising_step_list"] = "evenly down from 999, as its code has it without a t_list"
    if count != len(steps):
        recipe.refuse(f"{M}student_sample_steps", f"it is {count}, and t_list has {len(steps)}")
    elif kind == "dmd" and count == 1 and steps != [HIGHEST * 1000]:
        recipe.refuse(
            f"{M}sample_t_cfg.t_list", "a student of one step learns from pure noise, 0.999, whatever it says"
        )
    recipe.set("schedule.warp_denoising_step", False)
    if kind == "self_forcing":
        recipe.set("rollout.kind", "self_forcing")
        if recipe.get("rollout.same_step_across_blocks") is None:
            recipe.set("rollout.same_step_across_blocks", True)
            recipe.notes["rollout.same_step_across_blocks"] = "as its config_self_forcing has it"
    elif count == 1:
        recipe.set("rollout.kind", "backward_simulation")
    else:
        recipe.set("rollout.kind", "noised_data")
        recipe.values["data"] |= {"real": True, "latents": "latents"}
        recipe.missing["data.latents"] = "made by `python preprocess.py video`: its students start from noised videos"


def _scores(recipe: Recipe, kind: str) -> None:
    """u of [min_t, max_t], shifted and then within these bounds. Our bounds are of the shifted level."""
    staged = recipe.staged
    if staged.get("density") is None and kind == "dmd":
        recipe.refuse(
            f"{M}sample_t_cfg.time_dist_type",
            "config_dmd2 has polynomial, which Wan's levels do not know: write shifted or uniform",
        )
    shift = staged["shift"] if staged.get("density") == "shifted" else 1.0
    low, high = staged["low"], min(staged["high"], HIGHEST)
    recipe.set("schedule.score_timestep_shift", shift)
    for name, level in (("min", low), ("max", high)):
        recipe.set(f"schedule.{name}_score_timestep", round(1000 * shift * level / (1 + (shift - 1) * level), 6))
        recipe.set(f"schedule.{name}_sigma", level)


DIALECT = Dialect(
    "fastgen", RULES, DEFAULTS,
    {
        "trainer": "score_distillation",
        **{name: {} for name in NETWORKS},
        "data": {"kind": "wan", "real": False},
        "objective.kind": "dmd",
        "training.update_schedule": "alternating",
    },
    finish,
)  # fmt: skip
