"""The task that a run names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from model.network import NetworkConfig
from model.types import LatentSize
from tasks.data import DataConfig
from tasks.task import Task, TaskContext


class DescribesTask(Protocol):
    """What a run's config says of its task. See `TaskContext`."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def student(self) -> NetworkConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def drawn_sizes(self) -> Sequence[LatentSize] | None: ...


def build_task(config: DescribesTask, device: torch.device) -> Task:
    """What the run generates, by data.kind. Raises ConfigError."""
    return config.data.task(_context(config, device))


def task_to_sample(config: DescribesTask, device: torch.device) -> Task:
    """As `build_task`, for sampling from a run whose training data may be gone.

    Sampling does not need stored videos, images and prompts. It needs the text cache only if no text encoder is named.
    """
    return config.data.task_to_sample(_context(config, device))


def _context(config: DescribesTask, device: torch.device) -> TaskContext:
    return TaskContext(config.student, config.seed, device, config.drawn_sizes)
