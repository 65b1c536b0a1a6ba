"""From a config to the trainer that it names.

The trainer makes the rest: `Trainer.__init__` (trainer/base.py) its task and `RunNetworks`, and its own `build` the
networks with their optimizers.
"""

from __future__ import annotations

import torch

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
        check_first_frames(config)
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


def check_first_frames(config: RunConfig) -> None:
    """Raises ValueError for a run that would train on first frames and has none. Inference brings its own."""
    real, takes = config.needs_data() is not None, config.student.geometry()
    if not config.data.has_first_frame(takes.first_frame, real=real):
        return
    makes_samples = config.trainer in (TrainerKind.score_distillation, TrainerKind.ode)
    stored = config.trainer is TrainerKind.ode and config.ode.path is not None
    of_real_videos = real and not (makes_samples and not config.rollout.from_data)
    if not (of_real_videos or stored or config.data.draws_images):
        config.data.check_first_frames(takes.first_frame, takes.model_type)
