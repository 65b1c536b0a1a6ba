"""Decoupled DMD (arXiv 2511.22677): guidance and distribution matching at noise levels of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from model.decoupled_dmd import decoupled_dmd_loss
from model.objective import Draws, Objective, ObjectiveConfig
from model.query import ScoreQuery
from model.types import LossOutput
from utils.limits import SHIFT, check_within


@dataclass
class DecoupledDMDConfig(ObjectiveConfig):
    """DMD in two terms, guidance and distribution matching, at noise levels of their own.

    cfg_score_shift: shift of the guidance term's noise levels, null for the scores' own.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"reward", "critic_keep"})

    kind: str = "decoupled_dmd"
    cfg_score_shift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within(self, cfg_score_shift=f"(0, {SHIFT}]")


class DecoupledDMD(Objective):
    """The guidance term has the draw "cfg"."""

    kind = "decoupled_dmd"
    config_type = DecoupledDMDConfig
    config: DecoupledDMDConfig

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        return decoupled_dmd_loss(query, *draws.score("cfg", self.config.cfg_score_shift))
