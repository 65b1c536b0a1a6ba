"""What earlier versions saved, said in the keys of this one.

A run saves every key that its version has. So a file with all sections that lacks a key was saved before there was such
a key, while a recipe that lacks it takes the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from configs.schema import RunConfig
from configs.sections import DroppedCaption, TrainerKind
from utils.variants import merged

# of version 0.1, which all later ones save too
_SAVED = {
    *("name", "trainer", "seed", "student", "teacher", "critic", "data", "schedule", "causal", "rollout", "objective"),
    *("diffusion", "ode", "consistency", "generator_training", "critic_training", "ema", "training", "parallel"),
    *("checkpoint", "validation", "logging"),
}


def completed(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`values` of a config, with what was done before there was a key for it, where an earlier version saved them.

    Captions were dropped for the negative prompt. Where it is empty there is no difference, and none is said.
    """
    values = dict(values)
    if not values.keys() >= _SAVED or values["trainer"] != TrainerKind.diffusion.value:
        return values
    sections = (values["diffusion"], values["data"])
    if not all(isinstance(section, Mapping) for section in sections):
        return values  # which is refused when it is read
    diffusion, data = sections
    if "dropped_caption" in diffusion or not data.get("negative_prompt"):
        return values
    return merged(values, {"diffusion": {"dropped_caption": DroppedCaption.negative.value}})


def going_on(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """The config of a run that goes on from a checkpoint: what it leaves open stays as it was.

    saved: the checkpoint's config.
    """
    if config.diffusion.dropped_caption is not None:
        return config
    value = completed(saved).get("diffusion", {}).get("dropped_caption")
    dropped = None if value is None else DroppedCaption(value)
    return replace(config, diffusion=replace(config.diffusion, dropped_caption=dropped))
