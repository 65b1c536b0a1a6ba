"""What a student is trained on: the sections `objective` and `objective.gan` of a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from configs.sections import TrainedConfig
from model.discriminator import DEPTHS, tapped_blocks
from model.f_distill import Divergence, RatioBins
from model.gan import Adversarial, Penalty


class ObjectiveKind(Enum):
    dmd = "dmd"  # DMD, DMD2 with a gan section
    f_distill = "f_distill"  # DMD weighted by the discriminator's density ratio
    decoupled_dmd = "decoupled_dmd"  # guidance and distribution matching at noise levels of their own
    phased_dmd = "phased_dmd"  # one expert's interval, from schedule.min_score_timestep up
    sid = "sid"
    gan = "gan"  # a discriminator alone
    ladd = "ladd"  # the same on the frozen teacher, at logit-normal noise levels


class CriticLoss(Enum):
    flow = "flow"
    x0 = "x0"


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
        if self.weight < 0 or self.discriminator_weight <= 0:
            raise ValueError(
                f"weight must be >= 0, discriminator_weight > 0, got {self.weight} and {self.discriminator_weight}"
            )
        tapped_blocks(1, self.depths)
        self.penalty()

    def penalty(self) -> Penalty:
        return Penalty(self.r1, self.r2, self.penalty_step, self.penalty_per_step)


@dataclass
class FDistillConfig:
    """f-distill: DMD weighted by the discriminator's density ratio.

    divergence: which f-divergence is minimised.
    bin_momentum: what is kept of the ratio's running mean in each of 10 bins of noise levels, null for no such
        normalisation.
    """

    divergence: Divergence = Divergence.kl
    bin_momentum: float | None = 0.5

    def __post_init__(self) -> None:
        if self.bin_momentum is not None:
            RatioBins(self.bin_momentum)


@dataclass
class RewardConfig:
    """Samples weighted by exp(r / beta).

    name: of a reward that the task offers (toy: 'prompt_adherence').
    beta: how little the reward counts: the larger, the more even the weights.
    """

    name: str
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")


@dataclass
class ObjectiveConfig:
    """What the student is trained on. Guidance is `uncond + w (cond - uncond)`: 1 is none.

    kind: the loss.
    real_guidance_scale: w of the teacher's score.
    fake_guidance_scale: w of the critic's score.
    guidance_rescale: phi of the real score's norm rescaling, 0 for none.
    sid_alpha: SiD's alpha.
    ladd_mean: m of LADD's logit-normal noise levels.
    critic_loss: what the critic regresses on, the velocity or x0.
    gan: the discriminator, for the kinds that need one and beside dmd.
    f_distill: what kind f_distill takes beside the discriminator.
    reward: a reward that weighs the samples, null for none.
    cfg_score_shift: shift of decoupled DMD's noise levels for its guidance term, null for the scores' own.
    critic_keep: the critic is pulled to (1 - this) towards the student after each of its updates (SenseFlow: 0.97),
        null for none.
    """

    kind: ObjectiveKind = ObjectiveKind.dmd
    real_guidance_scale: float = 4.0
    fake_guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    sid_alpha: float = 1.0
    ladd_mean: float = 1.0
    critic_loss: CriticLoss = CriticLoss.flow
    gan: GANConfig | None = None
    f_distill: FDistillConfig = field(default_factory=FDistillConfig)
    reward: RewardConfig | None = None
    cfg_score_shift: float | None = None
    critic_keep: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1] (0 = none), got {self.guidance_rescale}")
        if self.critic_keep is not None and not 0 <= self.critic_keep <= 1:
            raise ValueError(f"critic_keep must be in [0, 1], or null for none, got {self.critic_keep}")
        if self.cfg_score_shift is not None and self.cfg_score_shift <= 0:
            raise ValueError(f"cfg_score_shift must be positive, or null, got {self.cfg_score_shift}")
        self._check_gan()
        self._check_unused()

    def _check_gan(self) -> None:
        kinds = ObjectiveKind
        if self.kind in (kinds.f_distill, kinds.gan, kinds.ladd) and self.gan is None:
            raise ValueError(f"gan is null, but kind {self.kind.value} needs a discriminator: give it a gan section")
        if self.gan is None:
            return
        if self.kind not in (kinds.dmd, kinds.f_distill, kinds.gan, kinds.ladd):
            raise ValueError(f"gan is not for kind {self.kind.value}: set it null, or choose dmd, f_distill, gan, ladd")
        if self.kind is kinds.ladd and self.gan.features is not Features.teacher:
            raise ValueError("gan.features must be teacher for kind ladd: for the critic's choose kind gan")
        if self.kind is kinds.f_distill and self.gan.loss is not Adversarial.softplus:
            raise ValueError("gan.loss must be softplus for kind f_distill: only its logit is the log of a ratio")

    def _check_unused(self) -> None:
        """What would be ignored without a word."""
        kinds, weighted = ObjectiveKind, (ObjectiveKind.dmd, ObjectiveKind.decoupled_dmd, ObjectiveKind.phased_dmd)
        if self.reward is not None and self.kind not in weighted:
            raise ValueError(f"reward is not for kind {self.kind.value}: choose {', '.join(k.value for k in weighted)}")
        if self.ladd_mean != 1.0 and self.kind is not kinds.ladd:
            raise ValueError(f"ladd_mean is not for kind {self.kind.value}: leave it at 1")
        if self.cfg_score_shift is not None and self.kind is not kinds.decoupled_dmd:
            raise ValueError("cfg_score_shift is for kind decoupled_dmd: set it null")
        if self.guidance_rescale and self.kind not in (kinds.dmd, kinds.f_distill, kinds.phased_dmd):
            raise ValueError(f"guidance_rescale is not for kind {self.kind.value}: set it to 0")
        if self.critic_keep is not None and self.kind in (kinds.gan, kinds.ladd):
            raise ValueError(f"critic_keep: kind {self.kind.value} has no fake score: set it null")
