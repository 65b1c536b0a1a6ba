"""rCM (arXiv 2510.08431): command lines of Hydra, `-m scripts.train ... -- experiment=NAME model.config.x=...`.

Read in NVlabs/rcm, `rcm/configs/experiments/rcm/wan2pt1_t2v.py` at 97578b7d and
`rcm/models/t2v_model_distill_rcm.py` at 20207e56. Its loss is that of a continuous-time consistency model beside DMD.
Its DMD alone rolls out 1 to 4 steps at random times. Nothing here does either, so every recipe is refused; `--check`
shows what its options are here. Guidance is cond + g (cond - uncond). Student and critic take turns.
"""

from __future__ import annotations

from typing import Any

from importers.data import finish_data, put_sizes
from importers.networks import NETWORKS, put_model
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    SPEED,
    STUDENT,
    VALIDATING,
    betas,
    count,
    harmless,
    integer,
    must_be,
    number,
    plus_one,
    refused,
    stage,
    truth,
)

M = "model.config."
EXPERIMENTS = {
    "wan2pt1_1pt3B_res480p_t2v_rCM": {
        "optimizer.lr": 2e-6, f"{M}optimizer_fake_score.lr": 4e-7, f"{M}student_update_freq": 5,
        f"{M}tangent_warmup": 1000, f"{M}teacher_ckpt": "assets/checkpoints/Wan2.1-T2V-1.3B.dcp/model",
    },
    "wan2pt1_14B_res480p_t2v_rCM": {
        "optimizer.lr": 1e-6, f"{M}optimizer_fake_score.lr": 1e-7, f"{M}student_update_freq": 10,
        f"{M}tangent_warmup": 300, f"{M}teacher_ckpt": "assets/checkpoints/Wan2.1-T2V-14B.dcp/model",
    },
}  # fmt: skip
# what an experiment brings where no other word says it, whichever comes first
OF_EXPERIMENT = {
    "optimizer.lr": f"{STUDENT}.optimizer.lr", f"{M}optimizer_fake_score.lr": f"{CRITIC}.optimizer.lr",
    f"{M}student_update_freq": "training.generator_update_interval",
}  # fmt: skip
CONSISTENCY = "of its consistency loss, which is none of ours"


def experiment(recipe: Recipe, value: Any) -> None:
    if value not in EXPERIMENTS:
        raise Untranslated(f"only {' and '.join(EXPERIMENTS)} are known")
    recipe.staged["experiment"] = value


def frames(recipe: Recipe, value: Any) -> None:
    put_sizes(recipe, "size", frames=integer(value))


RULES: dict[str, Rule] = {
    "program": must_be("scripts.train"),
    "experiment": Rule(tuple(OF_EXPERIMENT.values()), experiment),
    "optimizer.lr": number(f"{STUDENT}.optimizer.lr"),
    "optimizer.weight_decay": number(f"{STUDENT}.optimizer.weight_decay"),
    "optimizer.betas": betas(STUDENT),
    f"{M}optimizer_fake_score.lr": number(f"{CRITIC}.optimizer.lr"),
    f"{M}optimizer_fake_score.weight_decay": number(f"{CRITIC}.optimizer.weight_decay"),
    f"{M}optimizer_fake_score.betas": betas(CRITIC),
    f"{M}teacher_ckpt": stage("teacher", str, *(f"{name}.init" for name in NETWORKS)),
    f"{M}teacher_guidance": plus_one("objective.real_guidance_scale"),
    f"{M}student_update_freq": count("training.generator_update_interval"),
    f"{M}timestep_shift": number("schedule.score_timestep_shift"),
    f"{M}state_t": Rule(("data.wan.frames",), frames),
    f"{M}state_ch": must_be(16),
    f"{M}resolution": must_be("480p"),
    f"{M}precision": must_be("bfloat16"),
    f"{M}sigma_data": must_be(1.0),
    f"{M}rectified_flow_t_scaling_factor": must_be(1000.0),
    f"{M}grad_clip": stage("clip", truth, f"{STUDENT}.optimizer.clip_norm"),
    f"{M}ema.enabled": must_be(True),
    f"{M}ema.rate": refused("a power-function average is none of ours"),
    "trainer.max_iter": count("training.max_steps"),
    "checkpoint.save_iter": count("checkpoint.every"),
    "checkpoint.load_path": refused("a run of theirs cannot be resumed here"),
    "model_parallel.context_parallel_size": count("parallel.sequence"),
    "dataloader_train.batch_size": count("training.micro_batch_size"),
    "dataloader_train.tar_path_pattern": Rule((), lambda recipe, value: None, "a data-free run needs data.prompts"),
    **harmless(CONSISTENCY, f"{M}loss_scale", f"{M}tangent_warmup", f"{M}fd_type", f"{M}fd_size", f"{M}p_G.*",
               f"{M}sde.*"),
    **harmless("of its DMD, which sums over elements", f"{M}loss_scale_dmd", f"{M}loss_scale_fake_score", f"{M}p_D.*",
               f"{M}sde_D.*", f"{M}max_simulation_steps_fake", f"{M}adjust_video_noise", f"{M}sigma_max"),
    **harmless("the model's own parts, in Diffusers' layout here", f"{M}tokenizer.vae_pth", f"{M}text_encoder_path",
               f"{M}neg_embed_path", f"{M}text_encoder_class"),
    **harmless(SPEED, "config", f"{M}fsdp_shard_size", f"{M}net.sac_config.mode", "checkpoint.load_training_state",
               "checkpoint.strict_resume"),
    **harmless(LOGGING, "trainer.logging_iter", "job.*"),
    **harmless(VALIDATING, "trainer.callbacks.*"),
}  # fmt: skip
DEFAULTS = {
    "experiment": "wan2pt1_1pt3B_res480p_t2v_rCM", f"{M}teacher_guidance": 5.0, f"{M}timestep_shift": 5.0,
    f"{M}state_t": 20, "optimizer.weight_decay": 0.01, "optimizer.betas": [0.0, 0.999],
    f"{M}optimizer_fake_score.weight_decay": 0.01, f"{M}optimizer_fake_score.betas": [0.0, 0.999],
    f"{M}grad_clip": False, "dataloader_train.batch_size": 1, "trainer.max_iter": 100000,
}  # fmt: skip


def finish(recipe: Recipe) -> None:
    """What its options are here, and why a run of them would be another method's."""
    name = str(recipe.staged.get("experiment") or DEFAULTS["experiment"])
    known = EXPERIMENTS[name]
    for option, path in OF_EXPERIMENT.items():
        if recipe.get(path) is None:
            recipe.set(path, known[option])
    teacher = recipe.staged.get("teacher") or known[f"{M}teacher_ckpt"]
    for network in NETWORKS:
        put_model(recipe, network, str(teacher))
    recipe.set(f"{STUDENT}.optimizer.clip_norm", None)
    finish_data(recipe)
    recipe.refused.append(
        f"{name}: its consistency loss (sCM) and its DMD over random times in TrigFlow are none of ours, and a DMD run "
        "of these options would be another method's: configs/wan2.1_1.3b/dmd_3step.yaml is our own DMD"
    )


DIALECT = Dialect(
    "rcm", RULES, DEFAULTS,
    {
        "trainer": "score_distillation",
        "data": {"kind": "wan", "real": False},
        "objective.kind": "dmd",
        "rollout.kind": "backward_simulation",
        "training.update_schedule": "alternating",
        f"{STUDENT}.optimizer": {"kind": "adamw"},
        f"{CRITIC}.optimizer": {"kind": "adamw"},
    },
    finish,
)  # fmt: skip
