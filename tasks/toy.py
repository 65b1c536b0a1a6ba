"""The toy world as a task: see worlds/toy.py."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.sections import DataConfig
from model.network import NetworkConfig
from model.objective import RewardConfig
from tasks.task import Reward
from tasks.world import WorldTask
from utils.errors import ConfigError
from worlds.toy import ToyWorld
from worlds.toy_judge import ToyJudge


class ToyTask(WorldTask):
    """The toy world."""

    world: ToyWorld

    def __init__(self, config: DataConfig, student: NetworkConfig, seed: int, device: torch.device) -> None:
        super().__init__(ToyWorld(config.toy), config, student, seed, device)

    def reward(self, config: RewardConfig | None) -> Reward | None:
        """The judge's 'prompt_adherence'. The judge is trained at first use and kept on disk."""
        if config is None:
            return None
        if config.name != "prompt_adherence":
            raise ConfigError(f"objective.reward.name '{config.name}' is unknown: the toy world has prompt_adherence")
        return ToyJudge(self.world, Path("logs/cache")).adherence
