"""Score identity distillation (arXiv 2404.04057)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from model.objective import Draws, Objective, ObjectiveConfig
from model.query import ScoreQuery
from model.sid import sid_loss
from model.types import LossOutput


@dataclass
class SiDConfig(ObjectiveConfig):
    """Score identity distillation. sid_alpha: SiD's alpha."""

    takes: ClassVar[frozenset[str]] = frozenset({"critic_keep"})

    kind: str = "sid"
    sid_alpha: float = 1.0


class SiD(Objective):
    """Gradient flows through both scores' inputs."""

    kind = "sid"
    config_type = SiDConfig
    config: SiDConfig

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        return sid_loss(query, alpha=self.config.sid_alpha)
