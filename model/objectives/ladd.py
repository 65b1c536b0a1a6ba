"""Latent adversarial diffusion distillation (LADD, arXiv 2403.12015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from model.gan_config import Features
from model.ladd import ladd_sigma
from model.objective import Objective, ObjectiveConfig, Role
from model.schedule import ScheduleConfig


@dataclass
class LADDConfig(ObjectiveConfig):
    """A discriminator on the frozen teacher alone, at logit-normal noise levels. ladd_mean: their m."""

    takes: ClassVar[frozenset[str]] = frozenset({"gan"})
    needs_gan: ClassVar[bool] = True

    kind: str = "ladd"
    ladd_mean: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan is not None and self.gan.features is not Features.teacher:
            raise ValueError("gan.features must be teacher for kind ladd: for the critic's choose kind gan")


class LADD(Objective):
    """Samples are judged at logit-normal noise levels."""

    kind = "ladd"
    config_type = LADDConfig
    config: LADDConfig
    roles = frozenset({Role.teacher, Role.discriminator})

    def judged_at(self, uniform: Tensor, normal: Tensor, schedule: ScheduleConfig) -> Tensor:
        return ladd_sigma(normal, mean=self.config.ladd_mean).clamp(schedule.min_sigma, schedule.max_sigma)
