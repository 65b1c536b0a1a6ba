"""Images of digits as a task: see worlds/digits.py."""

from __future__ import annotations

import torch

from configs.sections import DataConfig
from model.network import NetworkConfig
from tasks.world import WorldTask
from worlds.digits import DigitsWorld


class DigitsTask(WorldTask):
    """scikit-learn's digits, videos of one frame."""

    world: DigitsWorld

    def __init__(self, config: DataConfig, student: NetworkConfig, seed: int, device: torch.device) -> None:
        super().__init__(DigitsWorld(config.digits), config, student, seed, device)
