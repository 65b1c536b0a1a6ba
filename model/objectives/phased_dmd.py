"""Phased DMD (arXiv 2510.27684): one expert's interval of noise levels, from schedule.min_score_timestep up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from model.objective import Draws, Objective, ObjectiveConfig
from model.phased import phase_start, phased_critic_loss, phased_dmd_loss
from model.query import ScoreQuery
from model.types import LossOutput


@dataclass
class PhasedDMDConfig(ObjectiveConfig):
    """DMD within one expert's interval of noise levels, from schedule.min_score_timestep up."""

    takes: ClassVar[frozenset[str]] = frozenset({"reward", "guidance_rescale", "critic_keep"})

    kind: str = "phased_dmd"


class PhasedDMD(Objective):
    """The samples that are matched are noised to the interval's start, by the draws "phase_noise"."""

    kind = "phased_dmd"
    config_type = PhasedDMDConfig
    in_interval = True

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        x_start = phase_start(query.rollout, query.least, draws.normal("phase_noise"))
        return phased_dmd_loss(query, x_start, query.least)

    def critic_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        x_start = phase_start(query.rollout, query.least, draws.normal("critic_phase_noise"))
        return phased_critic_loss(
            x_start, query.least, query.fake, query.conditioning, query.sigma, query.noise,
            frame_mask=query.rollout.frame_mask,
        )  # fmt: skip
