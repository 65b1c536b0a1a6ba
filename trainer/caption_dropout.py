"""Samples that are trained with the negative prompt in the place of their own.

B batch
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.types import Conditioning
from tasks.task import Task
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
