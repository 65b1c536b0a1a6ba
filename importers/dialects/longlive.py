"""LongLive 1.0 (arXiv 2509.22622): Self-Forcing's options, a window with sinks, adapters, and streaming training.

Its first stage is Self-Forcing's DMD with a window, and is carried over. Its second one goes on with one video over
many iterations, which nothing here does. Read in copies of its `longlive_train_init.yaml` and
`longlive_train_long.yaml` (mignonjia/LongLive at b3124687).
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
    STUDENT,
    VALIDATING,
    count,
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
LORA = adapter_keys("student", "critic")
BLOCK = [*ATTENTION, "ffn.0", "ffn.2"]  # all linear layers of a block


def shape(recipe: Recipe, value: Any) -> None:
    """[B, F, C, H, W] of latents; F is read nowhere."""
    _, _, channels, height, width = map(integer, value)
    if channels != 16:
        raise Untranslated("latents of 16 channels alone are carried over")
    put_sizes(recipe, "size", height=height, width=width)


ADAPTER: dict[str, Rule] = {
    "adapter.type": must_be("lora"),
    "adapter.rank": stage("rank", positive, *LORA),
    "adapter.alpha": stage("alpha", optional, *LORA),
    "adapter.dropout": must_be(0.0, why="an adapter has no dropout here"),
    "adapter.dtype": Rule((), lambda recipe, value: None, "its factors are stored in this; ours in fp32"),
    "adapter.apply_to_critic": stage("critic_too", truth, "critic.lora"),
    **harmless("what is printed", "adapter.verbose"),
}
RULES: dict[str, Rule] = {
    **self_forcing.RULES,
    **ADAPTER,
    "image_or_video_shape": Rule(("data.wan.height", "data.wan.width"), shape),
    "gradient_accumulation_steps": stage("accumulation", positive, "training.global_batch_size"),
    "max_iters": to("training.max_steps", lambda value: positive(value) + 1, "it ends after one iteration more"),
    "max_checkpoints": count("checkpoint.keep_last"),
    "min_num_training_frames": stage("least", positive, "data.wan.frames"),
    "num_training_frames": stage("most", positive, "rollout.num_training_frames"),
    "slice_last_frames": stage("judged", positive, "data.wan.frames"),
    "streaming_training": refused("training that goes on with one video over many iterations is none of ours"),
    "global_sink": Rule((), lambda recipe, value: None, "of videos whose prompt changes, which no training here makes"),
    **harmless(STREAMING, "streaming_chunk_size", "streaming_max_length", "streaming_min_new_frame",
               "train_first_chunk"),
    **harmless(VALIDATING, "vis_ema", "vis_video_lengths", "val_batch_size"),
}  # fmt: skip
DEFAULTS = {
    **{name: value for name, value in self_forcing.SHARED_DEFAULTS.items() if name != "num_training_frames"},
    "gradient_accumulation_steps": 1, "min_num_training_frames": 21, "num_training_frames": 21,
    "slice_last_frames": 21,
}  # fmt: skip


def finish(recipe: Recipe) -> None:
    staged = recipe.staged
    self_forcing.guide(recipe)
    self_forcing.bound(recipe)
    spread_base(recipe, self_forcing.BASE)
    least, most, judged = (staged[name] for name in ("least", "most", "judged"))
    if least != judged:
        recipe.refuse("min_num_training_frames", f"rollouts here have at least the {judged} frames that are judged")
    put_sizes(recipe, "size", frames=judged)
    recipe.set("rollout.num_training_frames", None if most == judged else most)
    if "rank" in staged:
        for network in ("student", "critic") if staged.get("critic_too", True) else ("student",):
            put_adapter(recipe, network, staged["rank"], staged.get("alpha"), BLOCK)
        recipe.set("ema.decay", None)
        recipe.drop("ema.start")
        recipe.notes["ema.decay"] = "its code keeps no average of adapters"
    self_forcing.put_batch(recipe, staged["accumulation"])
    if recipe.get(f"{CRITIC}.optimizer.lr") is None:
        recipe.set(f"{CRITIC}.optimizer.lr", recipe.get(f"{STUDENT}.optimizer.lr"))
    finish_data(recipe)
    student_updates(recipe)


DIALECT = Dialect("longlive", RULES, DEFAULTS, self_forcing.DIALECT.start, finish)
