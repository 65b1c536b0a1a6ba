"""Where the student's samples come from: a section of its own keys for each kind of rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from utils.limits import FRAMES, check_counts, check_within
from utils.variants import check_kind


@dataclass
class RolloutConfig:
    """Where the student's samples come from.

    kind: what they begin with, and in which order their frames are made.
    caption_dropout: share of samples whose prompt is replaced by the negative one: student, teacher, critic and
        discriminator all see that. Real samples, which a discriminator judges beside them, lose theirs alike. The DMD
        recipes of FastVideo, which call it training_cfg_rate, keep it at 0.
    reuse_rollout: in iterations that train both networks the critic learns from the generator's sample (made before
        its update, for the same prompts) instead of making its own: the critic then sees the student of one update ago
        and the batch that the student was just judged on, and an iteration costs one rollout less.
    """

    # whether its inputs are real videos, whether it looks back block by block, and whether each block has a noise level
    # of its own
    from_data: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    by_block: ClassVar[bool] = False

    kind: str = "self_forcing"
    caption_dropout: float = 0.0
    reuse_rollout: bool = False

    @classmethod
    def variants(cls) -> Mapping[str, type[RolloutConfig]]:
        """The config of each kind."""
        kinds = (
            SelfForcingConfig,
            BackwardSimulationConfig,
            NoisedDataConfig,
            DiffusionForcingConfig,
            TeacherForcingConfig,
        )
        return {config.kind: config for config in kinds}

    def __post_init__(self) -> None:
        check_kind(self)
        check_within(self, caption_dropout="[0, 1)")

    def longest(self, frames: int) -> int:
        """Latent frames of the longest rollout where the data's videos have `frames`."""
        return frames

    def mean_step(self, steps: int) -> float:
        """The mean number, from 0, of the step from which a sample is taken, of so many."""
        return (steps - 1) / 2


@dataclass
class ExitStepConfig(RolloutConfig):
    """A rollout that leaves the steps at one of them, whose output is the sample.

    last_step_only: always leave at the last step instead of a uniform draw over all steps.
    """

    last_step_only: bool = False

    def mean_step(self, steps: int) -> float:
        return steps - 1 if self.last_step_only else super().mean_step(steps)


@dataclass
class SelfForcingConfig(ExitStepConfig):
    """Causal, block by block over the KV cache.

    same_step_across_blocks: one exit step for all blocks, else one a block.
    num_training_frames: latent frames of the longest rollout, null for the data's own; lengths are drawn in whole
        blocks and the last `data` frames are judged.
    self_gradient: later blocks' losses reach the keys and values that they looked back at (self-gradient forcing), for
        one more pass over the finished blocks and the exit steps' inputs.
    """

    causal: ClassVar[bool] = True

    kind: str = "self_forcing"
    same_step_across_blocks: bool = True
    num_training_frames: int | None = None
    self_gradient: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"num_training_frames": FRAMES})

    def longest(self, frames: int) -> int:
        return self.num_training_frames or frames


@dataclass
class BackwardSimulationConfig(ExitStepConfig):
    """Bidirectional, from noise."""

    kind: str = "backward_simulation"


@dataclass
class NoisedDataConfig(ExitStepConfig):
    """Bidirectional, from real data."""

    from_data: ClassVar[bool] = True

    kind: str = "noised_data"


@dataclass
class DiffusionForcingConfig(RolloutConfig):
    """Causal, from real data (CausVid)."""

    from_data: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    by_block: ClassVar[bool] = True

    kind: str = "diffusion_forcing"


@dataclass
class TeacherForcingConfig(RolloutConfig):
    """Causal, from real data, noisy blocks looking back at clean ones."""

    from_data: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    by_block: ClassVar[bool] = True

    kind: str = "teacher_forcing"
