"""What a score-distillation loss asks its two scores: about which sample, at which noise level, with which guidance.

B batch  F latent frames  C channels  H W latent size  L text tokens  D text width
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.discriminator import Discriminator
from model.score import ScoreNet
from model.types import Conditioning, Prompt, Rollout


@dataclass(frozen=True)
class Guidance:
    """Guidance of the two scores, `uncond + w (cond - uncond)`, and the encoded negative prompt.

    rescale: phi of `model.score.rescaled` for the real score, 0 for none.
    """

    negative: Prompt
    real: float
    fake: float = 1.0
    rescale: float = 0.0


@dataclass(frozen=True)
class ScoreQuery:
    """The arguments that every loss on two scores shares.

    rollout: the student's sample, with gradient in `rollout.x0` [B, F, C, H, W].
    real: the teacher's score.
    fake: the critic's score, of what the student makes.
    conditioning: what the sample is conditioned on.
    guidance: the guidance of both scores, with the negative prompt.
    sigma: [B], one noise level in [0, 1] a sample, at which both scores are taken.
    noise: standard normal, like x0; both scores see the same noised sample.
    weight: [B], of each sample in the mean over them, detached by the loss; None is 1.
    ratio: [B], f-distill's density ratio that the weight comes from.
    judge: the discriminator, for objectives that need it.
    least: the lower bound of the noise levels at which scores are asked.
    """

    rollout: Rollout
    real: ScoreNet
    fake: ScoreNet
    conditioning: Conditioning
    guidance: Guidance
    sigma: Tensor
    noise: Tensor
    weight: Tensor | None = None
    ratio: Tensor | None = None
    judge: Discriminator | None = None
    least: float = 0.0
