"""Samples that are trained with the negative prompt or the empty text in the place of their own.

B batch
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import RunConfig
from model.types import Conditioning
from tasks.task import Task
from utils.errors import ConfigError
from utils.random import Noise

ROLE = "caption_dropout"


def dropped(noise: Noise, share: float) -> Tensor:
    """[B] bool: the samples that lose their prompt. Keyed by sample, so a split over ranks or a resume changes none."""
    return noise.uniform(ROLE) < share


def with_dropout(conditioning: Conditioning, task: Task, noise: Noise, share: float) -> Conditioning:
    """The conditioning with a share of its prompts replaced by the negative one. Images stay. A share of 0 draws
    nothing."""
    if share == 0:
        return conditioning
    gone, negative = dropped(noise, share), task.negative(conditioning.batch)
    return conditioning.with_prompt(
        {
            name: torch.where(gone.to(value.device).view(-1, *[1] * (value.ndim - 1)), negative[name], value)
            for name, value in conditioning.prompt.items()
        }
    )


def check_dropped_text(config: RunConfig, task: Task) -> None:
    """Raises ConfigError where trainer diffusion drops captions for a text that is known to have no embedding."""
    if config.dropped_text is None:
        return
    try:
        task.check_captions("diffusion.caption_dropout", [config.dropped_text])
    except ConfigError as problem:
        raise ConfigError(
            f"{problem}. With this recipe preprocess.py text encodes it too, and diffusion.dropped_caption=negative "
            "takes the negative prompt instead"
        ) from None
