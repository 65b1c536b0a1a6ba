"""What a run says of its discriminator: the section `objective.gan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from model.discriminator import DEPTHS, tapped_blocks
from model.gan import Adversarial, Penalty
from utils.fields import check_modes
from utils.limits import check_within
from utils.optim import TrainedConfig


class Features(Enum):
    teacher = "teacher"  # frozen
    critic = "critic"  # gets the classifier's gradient too


class Heads(Enum):
    video = "video"  # unpatchified tokens through a strided convolution, one logit a tapped block
    image = "image"  # a frame's grid of tokens through convolutions down to one, one logit a tapped block
    register = "register"  # learned tokens that look at the network's by cross-attention, one logit


@dataclass
class GANConfig:
    """A discriminator: heads on features of a score network at noised samples, real ones against the student's.

    weight: of the student's term beside another objective.
    discriminator_weight: of the discriminator's loss beside the critic's.
    features: which network's features the heads see.
    depths: at which shares of that network's depth its features are tapped.
    heads: what makes logits of the features.
    loss: the adversarial loss.
    r1: weight of the approximate penalty on real samples.
    r2: weight of the approximate penalty on generated samples.
    penalty_step: by how much the penalties move the noised sample.
    penalty_per_step: whether the penalties are divided by the square of penalty_step.
    same_draw: judge the student at DMD's own noise level and noise.
    training: how the heads are updated.
    """

    weight: float = 0.003
    discriminator_weight: float = 0.01
    features: Features = Features.teacher
    depths: list[float] = field(default_factory=lambda: list(DEPTHS))
    heads: Heads = Heads.video
    loss: Adversarial = Adversarial.softplus
    r1: float = 0.0
    r2: float = 0.0
    penalty_step: float = 0.1
    penalty_per_step: bool = False
    same_draw: bool = False
    training: TrainedConfig = field(default_factory=TrainedConfig)

    def __post_init__(self) -> None:
        check_modes(self)
        if self.weight < 0 or self.discriminator_weight <= 0:
            raise ValueError(
                f"weight must be >= 0, discriminator_weight > 0, got {self.weight} and {self.discriminator_weight}"
            )
        check_within(self, r1="[0, inf)", r2="[0, inf)", penalty_step="(0, inf)")
        tapped_blocks(1, self.depths)

    def penalty(self) -> Penalty:
        return Penalty(self.r1, self.r2, self.penalty_step, self.penalty_per_step)
