"""LongLive 1.0 (arXiv 2509.22622): Self-Forcing's options, a window with sinks, adapters, and streaming training.

Its first stage is Self-Forcing's DMD with a window, and is carried over. Its second one goes on with one video over
many iterations, which nothing here does. Read in copies of its `longlive_train_init.yaml` and
`longlive_train_long.yaml` (mignonjia/LongLive at b3124687), and in NVlabs/LongLive, `trainer/distillation.py` at
cb3a3ca6. An adapter's rank is 16 where a file leaves it out, and its alpha is the rank where that is left out or 0.
"""

from __future__ import annotations

from typing import Any

from importers.data import finish_data, put_sizes
from importers.dialects import self_forcing
from importers.lora import ATTENTION, adapter_keys, put_adapter
from importers.networks import spread_base
from importers.recipe import Dialect, Recipe, Rule, Untranslated
from importers.rules import (
    CRITIC,
    LOGGING,
    STUDENT,
    UNREAD,
    VALIDATING,
    harmless,
    integer,
    must_be,
    optional,
    positive,
    refused,
    stage,
    student_updates,
    to,
    truth,
)

STREAMING = "of streaming_training"
SWITCH = "of distribution_loss dmd_switch"
KEEP_ALL = 10**6  # checkpoints, where its 0 keeps all
RANK = 16  # of an adapter whose section says none
LORA = adapter_keys("student", "critic")
BLOCK = [*ATTENTION, "ffn.0", "ffn.2"]  # all linear layers of a block


def shape(recipe: Recipe, value: Any) -> None:
    """[B, F, C, H, W] of latents; F is read nowhere."""
    _, _, channels, height, width = map(integer, value)
    if channels != 16:
        raise Untranslated("latents of 16 channels alone are carried over")
    put_sizes(recipe, "size", height=height, width=width)


def loss(recipe: Recipe, value: Any) -> None:
    if value == "dmd_switch":
        raise Untranslated("videos whose prompt changes are none of ours: dmd is its loss without that")
    if value != "dmd":
        raise Untranslated("only dmd can be carried over")
    recipe.set("objective.kind", "dmd")


def judged_frames(recipe: Recipe, value: Any) -> None:
    if integer(value) == -1:
        raise Untranslated("here a fixed number of last frames is judged: write it")
    recipe.staged["judged"] = positive(value)


def section(recipe: Recipe, value: Any) -> None:
    if value is not None:
        raise Untranslated("an empty section is an adapter of rank 16 there: write adapter.rank, or leave it out")


ADAPTER: dict[str, Rule] = {
    "adapter": Rule((), section, "no adapter"),
    "adapter.type": must_be("lora"),
    "adapter.rank": stage("rank", positive, *LORA),
    "adapter.alpha": stage("alpha", optional, *LORA),
    "adapter.dropout": must_be(0.0, why="an adapter has no dropout here"),
    "adapter.dtype": Rule((), lambda recipe, value: None, f"{UNREAD}: its factors are in fp32, as ours"),
    "adapter.apply_to_critic": stage("critic_too", truth, "critic.lora"),
    **harmless("what is printed", "adapter.verbose"),
}
RULES: dict[str, Rule] = {
    **self_forcing.RULES,
    **ADAPTER,
    "distribution_loss": Rule(("objective.kind",), loss),
    "lora_ckpt": refused("an adapter that goes on from a file, with its critic's and its iteration, is none of ours"),
    "model_kwargs.use_infinite_attention": must_be(False),
    "image_or_video_shape": Rule(("data.wan.height", "data.wan.width"), shape),
    "gradient_accumulation_steps": stage("accumulation", positive, "training.global_batch_size"),
    "max_iters": to("training.max_steps", lambda value: positive(value) + 1, "it ends after one iteration more"),
    "max_checkpoints": to("checkpoint.keep_last", lambda value: integer(value) or KEEP_ALL, "its 0 keeps all"),
    "min_num_training_frames": stage("least", positive, "data.wan.frames"),
    "num_training_frames": stage("most", positive, "rollout.num_training_frames"),
    "slice_last_frames": Rule(("data.wan.frames",), judged_frames),
    "streaming_training": refused("training that goes on with one video over many iterations is none of ours"),
    "global_sink": Rule((), lambda recipe, value: None, "of videos whose prompt changes, which no training here makes"),
    **harmless(STREAMING, "streaming_chunk_size", "streaming_max_length", "streaming_min_new_frame",
               "streaming_possible_max_length", "train_first_chunk"),
    **harmless(SWITCH, "switch_prompt_path", "switch_mode", "switch_choices", "fixed_switch_index",
               "min_switch_frame_index", "max_switch_frame_index"),
    **harmless(f"{UNREAD}: the batch is the GPUs times batch_size times gradient_accumulation_steps",
               "total_batch_size"),
    **harmless(VALIDATING, "vis_ema", "vis_video_lengths", "val_batch_size", "val_switch_prompt_path"),
    **harmless(LOGGING, "use_one_logger", "one_logger_project"),
}  # fmt: skip
DEFAULTS = {
    **{name: value for name, value in self_forcing.SHARED_DEFAULTS.items() if name != "num_training_frames"},
    "gradient_accumulation_steps": 1, "min_num_training_frames": 21, "num_training_frames": 21,
    "slice_last_frames": 21, "max_iters": 10000,
}  # fmt: skip


def finish(recipe: Recipe) -> None:
    staged = recipe.staged
    self_forcing.require(recipe)
    self_forcing.guide(recipe)
    self_forcing.exit_bounds(recipe)
    self_forcing.bound(recipe)
    spread_base(recipe, self_forcing.BASE)
    least, most, judged = (staged[name] for name in ("least", "most", "judged"))
    if least != judged:
        recipe.refuse("min_num_training_frames", f"rollouts here have at least the {judged} frames that are judged")
    if most < judged:
        recipe.refuse("num_training_frames", f"no rollout has the {judged} frames that are judged")
    put_sizes(recipe, "size", frames=judged)
    recipe.set("rollout.num_training_frames", None if most == judged else most)
    if put_adapters(recipe):
        recipe.set("ema.decay", None)
        recipe.drop("ema.start")
        recipe.notes["ema.decay"] = "its code keeps no average of adapters"
    if "student" in staged.get("files", {}):
        recipe.notes["critic.init"] = (
            "its code takes the critic and the iteration of generator_ckpt too, if that file has them: name it as "
            "critic.init then"
        )
    self_forcing.put_batch(recipe, staged["accumulation"])
    if recipe.get(f"{CRITIC}.optimizer.lr") is None:
        recipe.set(f"{CRITIC}.optimizer.lr", recipe.get(f"{STUDENT}.optimizer.lr"))
    finish_data(recipe)
    student_updates(recipe)


def put_adapters(recipe: Recipe) -> bool:
    """Adapters of the student, and of the critic unless the section says not; False for a file without the section."""
    if not any(line.option.startswith("adapter.") for line in recipe.lines):
        return False
    staged = recipe.staged
    rank = staged.get("rank", RANK)
    for network in ("student", "critic") if staged.get("critic_too", True) else ("student",):
        put_adapter(recipe, network, rank, staged.get("alpha") or float(rank), BLOCK)
    return True


DIALECT = Dialect("longlive", RULES, DEFAULTS, self_forcing.DIALECT.start, finish)
