"""The task that a run names."""

from __future__ import annotations

from typing import Protocol

import torch

from model.network import NetworkConfig
from tasks.data import DataConfig
from tasks.task import Task


class DescribesTask(Protocol):
    """What a run's config says of its task. seed: of the order of prompts and samples."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def student(self) -> NetworkConfig: ...
    @property
    def seed(self) -> int: ...


def build_task(config: DescribesTask, device: torch.device) -> Task:
    """What the run generates, by data.kind. Raises ConfigError."""
    return config.data.task(config.student, config.seed, device)


def task_to_sample(config: DescribesTask, device: torch.device) -> Task:
    """As `build_task`, for sampling from a run whose training data may be gone.

    Sampling does not need stored videos, images and prompts. It needs the text cache only if no text encoder is named.
    """
    return config.data.task_to_sample(config.student, config.seed, device)
