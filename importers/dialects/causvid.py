"""CausVid (arXiv 2412.07772): YAML of `causvid/train_distillation.py`.

Read in tianweiy/CausVid, `causvid/dmd.py` at ab7dcce2, and in copies of it `train_distillation.py` and
`wan_causal_dmd.yaml`. Guidance is cond + s (cond - uncond). One rate and one pair of betas are both networks'. There is
no average. Its causal student learns from noised videos, a level for each block, which is our diffusion_forcing. A list
that ends in 0, as those of its published causal recipes do, trains it on clean blocks too, which is none of ours. The
student's shift is 8, whatever a file says.
"""

from __future__ import annotations

from typing import Any

from importers.data import finish_data, put_sizes
from importers.dialects.self_forcing import flow, seed
from importers.networks import NETWORKS, put_model, weights
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    SPEED,
    STUDENT,
    UNREAD,
    checkpointing,
    count,
    flag,
    harmless,
    integer,
    listed,
    must_be,
    number,
    one_of,
    plus_one,
    positive,
    precision,
    real,
    refused,
    stage,
    text,
    to,
    truth,
)

SHIFT = 8.0  # of the student's steps, in its code
CAUSAL_NETS, CAUSAL_TASKS = {"wan": False, "causal_wan": True}, {"bidirectional_video": False, "causal_video": True}
BOTH = (STUDENT, CRITIC)


def rate(recipe: Recipe, value: Any) -> None:
    for section in BOTH:
        recipe.set(f"{section}.optimizer.lr", real(value))


def one_beta(index: int) -> Rule:
    keys = tuple(f"{section}.optimizer.betas" for section in BOTH)

    def carry(recipe: Recipe, value: Any) -> None:
        for key in keys:
            pair = list(recipe.get(key) or [0.9, 0.999])
            pair[index] = real(value)
            recipe.set(key, pair)

    return Rule(keys, carry)


def levels(value: Any) -> list[int]:
    found = [integer(step) for step in listed(value)]
    if found and found[-1] == 0:
        raise Untranslated("its 0 trains the student on clean videos too, which is none of ours: leave it out")
    return found


def causal(name: str, known: dict[str, bool]) -> Rule:
    """Whether the student's network, or its task, goes block by block."""

    def carry(recipe: Recipe, value: Any) -> None:
        if value not in known:
            raise Untranslated(f"only {', '.join(known)} can be carried over")
        recipe.staged[name] = known[value]

    return Rule(("rollout.kind",), carry)


def shape(recipe: Recipe, value: Any) -> None:
    """[B, F, C, H, W] of latents."""
    _, frames, channels, height, width = map(integer, value)
    if channels != 16:
        raise Untranslated("latents of 16 channels alone are carried over")
    put_sizes(recipe, "size", frames=frames, height=height, width=width)


def trained(role: str) -> Rule:
    return must_be(role != "real_score")


RULES: dict[str, Rule] = {
    "model_name": must_be("wan"),
    "generator_name": causal("net", CAUSAL_NETS),
    "real_name": must_be("wan"),
    "fake_name": must_be("wan"),
    "generator_ckpt": weights("student"),
    "generator_task": causal("task", CAUSAL_TASKS),
    "generator_task_type": causal("task_type", CAUSAL_TASKS),
    "real_task_type": must_be("bidirectional_video"),
    "fake_task_type": must_be("bidirectional_video"),
    "i2v": must_be(False),
    **{f"{role}_grad.model": trained(role) for role in ("generator", "real_score", "fake_score")},
    "distillation_loss": one_of("objective.kind", {"dmd": "dmd"}),
    "denoising_step_list": to("schedule.denoising_step_list", levels),
    "warp_denoising_step": flag("schedule.warp_denoising_step"),
    "backward_simulation": stage("simulated", truth, "rollout.kind"),
    "num_train_timestep": must_be(1000),
    "timestep_shift": number("schedule.score_timestep_shift"),
    "real_guidance_scale": plus_one("objective.real_guidance_scale"),
    "denoising_loss_type": to("objective.critic_loss", flow),
    "mixed_precision": precision,
    "seed": Rule(("seed",), seed),
    "lr": Rule(tuple(f"{section}.optimizer.lr" for section in BOTH), rate),
    "beta1": one_beta(0),
    "beta2": one_beta(1),
    "data_path": stage("stored", str, "data.prompts"),
    "batch_size": count("training.micro_batch_size"),
    "log_iters": count("checkpoint.every"),
    "negative_prompt": text("data.negative_prompt"),
    "dfake_gen_update_ratio": count("training.generator_update_interval"),
    "image_or_video_shape": Rule(("data.wan.frames", "data.wan.height", "data.wan.width"), shape),
    "gradient_checkpointing": checkpointing,
    "num_frame_per_block": stage("block", positive, "causal.num_frame_per_block", why="of a causal student"),
    "model_path": refused("its code loads the 1.3B of its own folder"),
    **harmless(UNREAD, "extra_noise_step"),
    **harmless("of another stage's trainer", "max_pair"),
    **harmless(LOGGING, "wandb_host", "wandb_key", "wandb_entity", "wandb_project", "wandb_name", "output_path",
               "no_save", "no_visualize"),
    **harmless(SPEED, "sharding_strategy", *(f"{role}_fsdp_{what}" for what in ("wrap_strategy", "transformer_module")
               for role in ("generator", "real_score", "fake_score", "text_encoder"))),
}  # fmt: skip
DEFAULTS = {
    "backward_simulation": True, "timestep_shift": 1.0, "beta1": 0.9, "beta2": 0.999, "seed": 0,
    "warp_denoising_step": False, "num_frame_per_block": 1,
}  # fmt: skip


def finish(recipe: Recipe) -> None:
    for name in NETWORKS:
        put_model(recipe, name, "Wan2.1-T2V-1.3B")
    _rollout(recipe)
    for section in BOTH:
        recipe.set(f"{section}.optimizer.weight_decay", 0.01)
        recipe.set(f"{section}.optimizer.clip_norm", 10.0)
    recipe.set("schedule.timestep_shift", SHIFT)
    recipe.set("ema.decay", None)
    micro = recipe.get("training.micro_batch_size") or 1
    recipe.missing["training.global_batch_size"] = f"{micro} times the GPUs"
    recipe.missing["training.max_steps"] = "its code trains until somebody ends it"
    finish_data(recipe)


def _rollout(recipe: Recipe) -> None:
    """Simulated from noise, or noised from videos: one level a sample, or one a block of a causal student."""
    staged = recipe.staged
    net, simulated, stored = staged.get("net", False), staged["simulated"], staged.get("stored")
    task = staged.get("task_type", staged.get("task", False))
    if net != task:
        recipe.refuse("generator_name", "its task is the other kind's: causal_wan and causal_video go together here")
    said = {line.option for line in recipe.lines}
    for name in ("real_task_type", "fake_task_type"):
        if staged.get("task", False) and name not in said:
            recipe.refuse(name, "left out it is generator_task: scores of a level for each block are none of ours")
    if net and simulated:
        recipe.refuse("backward_simulation", "its causal student is simulated nowhere, and its code stops at that")
    if simulated:
        recipe.set("rollout.kind", "backward_simulation")
        recipe.set("data.prompts", stored)
        return
    recipe.set("rollout.kind", "diffusion_forcing" if net else "noised_data")
    recipe.values["data"] |= {"real": True, "latents": stored}
    recipe.notes["data.latents"] = "its LMDB of trajectories, of which the clean ends are read"
    if net:
        recipe.set("causal.num_frame_per_block", staged["block"])


DIALECT = Dialect(
    "causvid", RULES, DEFAULTS,
    {
        "trainer": "score_distillation",
        **{name: {} for name in NETWORKS},
        "data": {"kind": "wan", "real": False},
        f"{STUDENT}.optimizer": {"kind": "adamw"},
        f"{CRITIC}.optimizer": {"kind": "adamw"},
    },
    finish,
)  # fmt: skip
