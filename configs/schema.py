"""What a run's YAML may say. Sections that have an owner are defined beside it, and this file joins them.

configs/checks.py refuses sections that cannot work together. configs/load.py reads and checks a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.rollout import RolloutConfig
from configs.sections import (
    CheckpointConfig,
    ConsistencyConfig,
    DiffusionConfig,
    DiffusionMode,
    DroppedCaption,
    GuardConfig,
    LoggingConfig,
    ODEConfig,
    TrainerKind,
    TrainingConfig,
    ValidationConfig,
)
from model.ema import EMAConfig
from model.network import NetworkConfig
from model.objective import ObjectiveConfig
from model.schedule import ScheduleConfig
from model.types import LatentSize
from pipeline.causal import CausalConfig
from tasks.data import DataConfig
from utils.fields import check_modes
from utils.optim import TrainedConfig
from utils.parallel.mesh import ParallelConfig
from utils.watchdog import WatchdogConfig

NAME = 200  # characters of a run's name, which is shown in each line


@dataclass
class RunConfig:
    """One run.

    name: under which the run is shown.
    trainer: what is trained, and how.
    seed: of random weights, of every draw and of the order of prompts.
    student: the network that is trained, in every trainer.
    teacher: the frozen network whose score is the real one.
    critic: the network that learns the fake score.
    generator_training: how the student is updated.
    critic_training: how the critic is updated.
    """

    name: str = "run"
    trainer: TrainerKind = TrainerKind.score_distillation
    seed: int = 0
    student: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: NetworkConfig | None = None
    critic: NetworkConfig | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig.variants()["toy"]())
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig.variants()["self_forcing"]())
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig.variants()["dmd"]())
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ode: ODEConfig = field(default_factory=ODEConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    generator_training: TrainedConfig = field(default_factory=TrainedConfig)
    critic_training: TrainedConfig = field(default_factory=TrainedConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        check_modes(self)
        if len(self.name) > NAME:
            raise ValueError(f"name must have at most {NAME} characters, got {len(self.name)}: shorten it")

    @property
    def is_causal(self) -> bool:
        """Whether the trained network generates block by block."""
        match self.trainer:
            case TrainerKind.score_distillation:
                return self.rollout.causal
            case TrainerKind.diffusion:
                return self.diffusion.mode is not DiffusionMode.bidirectional
            case TrainerKind.ode | TrainerKind.consistency:
                return True

    @property
    def drawn_sizes(self) -> list[LatentSize] | None:
        """The sizes that training may draw, in the order of `training.sizes`; None for the data's own alone."""
        if self.training.sizes is None:
            return None
        frames, height, width = self.data.size
        return [(s.frames or frames, s.height or height, s.width or width) for s in self.training.sizes]

    @property
    def few_steps(self) -> bool:
        """Whether the trained network is sampled by the step list, and not by a many-step solver."""
        return self.is_causal or self.trainer is not TrainerKind.diffusion

    @property
    def dropped_text(self) -> str | None:
        """What trainer diffusion trains with in the place of a dropped caption; None for a run that drops none."""
        if self.trainer is not TrainerKind.diffusion or self.diffusion.caption_dropout == 0:
            return None
        return self.data.negative_prompt if self.diffusion.dropped_caption is DroppedCaption.negative else ""

    @property
    def fps(self) -> int:
        """Frames a second of its videos."""
        if self.validation.fps is not None:
            return self.validation.fps
        return self.data.fps(self.student)

    def needs_data(self) -> str | None:
        """The part of the config that needs real videos, in words; None if no part does."""
        if self.trainer in (TrainerKind.diffusion, TrainerKind.consistency):
            return f"trainer {self.trainer.value}"
        if self.trainer is TrainerKind.score_distillation and self.rollout.from_data:
            return f"rollout.kind {self.rollout.kind}"
        if self.trainer is TrainerKind.score_distillation and self.objective.gan is not None:
            return "objective.gan"
        return None
