"""Distribution matching distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867, with a gan section)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from model.dmd import dmd_loss
from model.objective import Draws, Objective, ObjectiveConfig
from model.query import ScoreQuery
from model.types import LossOutput


@dataclass
class DMDConfig(ObjectiveConfig):
    """DMD; with a gan section it is DMD2."""

    takes: ClassVar[frozenset[str]] = frozenset({"gan", "reward", "guidance_rescale", "critic_keep"})


class DMD(Objective):
    """The student's samples follow the difference of the two scores."""

    kind = "dmd"
    config_type = DMDConfig

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        return dmd_loss(query)
