"""f-distill (arXiv 2502.15681): DMD weighted by the discriminator's density ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from model.f_distill import Divergence, RatioBins, RatioWeighting, f_distill_loss, f_weights
from model.gan import Adversarial, NoisedSamples
from model.objective import SCORES, Draws, Objective, ObjectiveConfig, Role, Weights
from model.query import ScoreQuery
from model.types import LossOutput, Total
from utils.fields import check_modes
from utils.limits import check_within


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
        check_modes(self)
        check_within(self, bin_momentum="(0, 1)")  # what 0 and 1 would do, RatioBins says


@dataclass
class FDistillObjectiveConfig(ObjectiveConfig):
    """DMD weighted by the discriminator's density ratio. f_distill: how the density ratio becomes a weight."""

    takes: ClassVar[frozenset[str]] = frozenset({"gan", "guidance_rescale", "critic_keep"})
    needs_gan: ClassVar[bool] = True

    kind: str = "f_distill"
    f_distill: FDistillConfig = field(default_factory=FDistillConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan is not None and self.gan.loss is not Adversarial.softplus:
            raise ValueError("gan.loss must be softplus for kind f_distill: only its logit is the log of a ratio")


class FDistill(Objective):
    """The discriminator's term is part of the loss: one evaluation of its backbone gives ratio and term."""

    kind = "f_distill"
    config_type = FDistillObjectiveConfig
    config: FDistillObjectiveConfig
    roles = SCORES | {Role.discriminator}
    weighs = True

    def __init__(self, config: FDistillObjectiveConfig, total: Total) -> None:
        super().__init__(config, total)
        momentum = config.f_distill.bin_momentum
        self.bins = None if momentum is None else RatioBins(momentum)
        self.weighting = RatioWeighting(config.f_distill.divergence, total, self.bins)

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        assert query.judge is not None
        assert self.config.gan is not None
        gan_weight = self.config.gan.weight
        return f_distill_loss(query, query.judge, self.weighting, gan_weight=gan_weight, ratio=query.ratio)

    @torch.no_grad()
    def weights(self, queries: Sequence[ScoreQuery]) -> list[Weights]:
        logits = []
        for query in queries:
            assert query.judge is not None
            samples = NoisedSamples.of(query.rollout, query.conditioning, query.sigma, query.noise)
            logits.append(samples.logits(query.judge))
        sizes = [query.conditioning.batch for query in queries]
        sigma = torch.cat([query.sigma for query in queries])
        weight, ratio = f_weights(torch.cat(logits), sigma, self.weighting)
        return [Weights(*parts) for parts in zip(weight.split(sizes), ratio.split(sizes), strict=True)]

    def state(self) -> dict[str, list[float]]:
        return {} if self.bins is None else {"ratio_means": self.bins.means.tolist()}

    def load(self, state: dict[str, list[float]]) -> None:
        if self.bins is not None and "ratio_means" in state:
            self.bins.load({"means": torch.tensor(state["ratio_means"])})
