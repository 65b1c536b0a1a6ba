"""The task that a config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from configs.schema import RunConfig
from configs.sections import DataConfig
from configs.sizes import sizes_of
from model.network import NetworkConfig
from tasks.digits import DigitsTask
from tasks.encoded import EncodedTask
from tasks.synthetic import SyntheticTask
from tasks.task import Task
from tasks.toy import ToyTask


def build_task(config: RunConfig, device: torch.device) -> Task:
    """What the run generates, by data.kind. Raises ConfigError."""
    kinds: dict[str, Callable[[DataConfig, NetworkConfig, int, torch.device], Task]] = {
        "toy": ToyTask,
        "digits": DigitsTask,
        "synthetic": SyntheticTask,
    }
    if config.data.kind == "wan":
        return EncodedTask(config.data, config.student, config.seed, device, sizes=_drawn(config))
    return kinds[config.data.kind](config.data, config.student, config.seed, device)


def _drawn(config: RunConfig) -> list[tuple[int, int, int]] | None:
    """The sizes (F, H, W) of the real videos that the run draws; None is its own size alone."""
    return None if config.training.sizes is None else sizes_of(config)


def task_to_sample(config: RunConfig, device: torch.device) -> Task:
    """As `build_task`, for sampling from a run whose training data may be gone.

    Sampling does not need stored videos, images and prompts. It needs the text cache only if no text encoder is named.
    """

    def if_present(path: str | None) -> str | None:
        return path if path is not None and Path(path).exists() else None

    data = config.data
    text = data.text if data.text.encoder is None else replace(data.text, cache=if_present(data.text.cache))
    data = replace(
        data,
        latents=if_present(data.latents),
        images=if_present(data.images),
        prompts=if_present(data.prompts),
        text=text,
    )
    if data.kind == "wan":
        return EncodedTask(data, config.student, config.seed, device, library=[], sizes=_drawn(config))
    return build_task(replace(config, data=data), device)
