"""From a config to the trainer that it names.

The trainer makes the rest: `Trainer.__init__` (trainer/base.py) its task and `RunNetworks`, and its own `build` the
networks with their optimizers.
"""

from __future__ import annotations

import torch

from configs.images import check_images
from configs.schema import RunConfig
from configs.sections import TrainerKind
from trainer.base import RunOptions, Trainer
from trainer.consistency import ConsistencyTrainer
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.ode import ODETrainer
from utils import distributed
from utils.errors import ConfigError
from utils.parallel import deepspeed
from utils.parallel.mesh import EngineKind


def build_trainer(config: RunConfig, options: RunOptions) -> Trainer:
    """The trainer that the config names, resumed if there is something to resume. Raises ConfigError."""

    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    try:
        check_images(config, real=config.needs_data() is not None)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    distributed.init()
    if config.parallel.engine is EngineKind.deepspeed:
        deepspeed.start()
    match config.trainer:
        case TrainerKind.score_distillation:
            return ScoreDistillationTrainer(config, options)
        case TrainerKind.diffusion:
            return DiffusionTrainer(config, options)
        case TrainerKind.ode:
            return ODETrainer(config, options)
        case TrainerKind.consistency:
            return ConsistencyTrainer(config, options)
