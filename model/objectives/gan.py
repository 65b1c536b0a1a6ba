"""A discriminator alone: no scores are compared (model/gan.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from model.objective import Objective, ObjectiveConfig, Role


@dataclass
class GANObjectiveConfig(ObjectiveConfig):
    """A discriminator alone."""

    takes: ClassVar[frozenset[str]] = frozenset({"gan"})
    needs_gan: ClassVar[bool] = True

    kind: str = "gan"


class GAN(Objective):
    """The student's whole loss is the discriminator's term."""

    kind = "gan"
    config_type = GANObjectiveConfig
    roles = frozenset({Role.discriminator})
