"""What a student is trained on: the base of all objectives, what their configs share, and how they are found.

An objective is one file in model/objectives/: a class with its config. Nothing else names it: `objectives` finds it by
its file, and `objective.kind` in a YAML chooses it. docs/extending.md adds one. A script registers its own instead.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from model.dmd import critic_loss
from model.gan_config import GANConfig
from model.query import ScoreQuery
from model.schedule import ScheduleConfig
from model.types import LossOutput, Total
from utils.fields import check_modes
from utils.found import Registry
from utils.variants import check_kind


class CriticLoss(Enum):
    flow = "flow"
    x0 = "x0"


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
    critic_loss: what the critic regresses on, the velocity or x0.
    gan: the discriminator, for the kinds that need one and beside dmd.
    reward: a reward that weighs the samples, null for none.
    critic_keep: the critic is pulled to (1 - this) towards the student after each of its updates (SenseFlow: 0.97),
        null for none.
    """

    # which of the keys that not every kind has this one takes, and whether it needs a discriminator
    takes: ClassVar[frozenset[str]] = frozenset()
    needs_gan: ClassVar[bool] = False

    kind: str = "dmd"
    real_guidance_scale: float = 4.0
    fake_guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    critic_loss: CriticLoss = CriticLoss.flow
    gan: GANConfig | None = None
    reward: RewardConfig | None = None
    critic_keep: float | None = None

    @classmethod
    def variants(cls) -> Mapping[str, type[ObjectiveConfig]]:
        """The config of each kind."""
        return {kind: objective.config_type for kind, objective in objectives().items()}

    def __post_init__(self) -> None:
        check_kind(self)
        check_modes(self)
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1] (0 = none), got {self.guidance_rescale}")
        if self.critic_keep is not None and not 0 <= self.critic_keep <= 1:
            raise ValueError(f"critic_keep must be in [0, 1], or null for none, got {self.critic_keep}")
        if self.needs_gan and self.gan is None:
            raise ValueError(f"gan is null, but kind {self.kind} needs a discriminator: give it a gan section")
        for key in ("gan", "reward", "guidance_rescale", "critic_keep"):
            default = next(item.default for item in fields(ObjectiveConfig) if item.name == key)
            assert default is not MISSING
            if getattr(self, key) != default and key not in self.takes:
                others = [kind for kind, config in self.variants().items() if key in config.takes]
                raise ValueError(f"{key} is not for kind {self.kind}: leave it out, or choose {', '.join(others)}")


class Role(Enum):
    """The networks that an objective may need beside the student."""

    teacher = "teacher"
    critic = "critic"
    discriminator = "discriminator"


SCORES = frozenset({Role.teacher, Role.critic})


@dataclass(frozen=True)
class Weights:
    """weight [B] of each sample's loss; ratio [B] that it comes from, in f-distill."""

    weight: Tensor
    ratio: Tensor | None = None


class Draws(Protocol):
    """What is random in a sample's losses, keyed by a name: equal names give equal draws."""

    def score(self, name: str, shift: float | None = None) -> tuple[Tensor, Tensor]:
        """A noise level [B] within the schedule's bounds, and noise like x0. shift: None is the schedule's own."""
        ...

    def normal(self, name: str) -> Tensor:
        """Standard normal, like x0."""
        ...


class Objective:
    """One way to train a student. Subclasses are found by their file in model/objectives/.

    kind: its name in a YAML.
    config_type: its section of a YAML, an ObjectiveConfig.
    roles: the networks that it needs. One without scores is judged by the discriminator alone, and has no loss of its
        own.
    weighs: whether a sample's weight depends on the rest of the global batch.
    in_interval: whether it needs an interval of noise levels, from schedule.min_score_timestep up.

    config: the section, an instance of config_type.
    total: sums a tensor over the batches that run at a time; a collective.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[ObjectiveConfig]]
    roles: ClassVar[frozenset[Role]] = SCORES
    weighs: ClassVar[bool] = False
    in_interval: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if len(cls.roles & SCORES) == 1 and Role.discriminator not in cls.roles:
            raise TypeError(
                f"{cls.__name__}.roles: one score has nothing to be compared with: name teacher and critic, or a "
                "discriminator"
            )

    def __init__(self, config: ObjectiveConfig, total: Total) -> None:
        self.config, self.total = config, total

    def student_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        """The student's loss, with gradient into `query.rollout.x0`. The query is at the draw "score"."""
        raise NotImplementedError

    def critic_loss(self, query: ScoreQuery, draws: Draws) -> LossOutput:
        """The critic's loss on a detached sample. The query is at the draw "critic"."""
        x0_target = self.config.critic_loss is CriticLoss.x0
        return critic_loss(query.rollout, query.fake, query.conditioning, query.sigma, query.noise, x0_target=x0_target)

    @torch.no_grad()
    def weights(self, queries: Sequence[ScoreQuery]) -> list[Weights]:
        """For objectives that weigh: each query's samples' weights, of mean 1 over all of them and all ranks."""
        raise NotImplementedError

    def judged_at(self, uniform: Tensor, normal: Tensor, schedule: ScheduleConfig) -> Tensor:
        """The noise level [B] at which a discriminator judges, from a uniform and a normal draw [B]."""
        return schedule.score_sigma(uniform)

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold of it."""
        return {}

    def load(self, state: dict[str, list[float]]) -> None:
        """Takes back what `state` gave."""


Own = TypeVar("Own", bound=Objective)

_REGISTRY = Registry("model.objectives", Objective, first="dmd")


def objectives() -> Mapping[str, type[Objective]]:
    """All objectives by kind, DMD first, for it is the default."""
    return _REGISTRY.kinds()


def register(objective: type[Own]) -> type[Own]:
    """Adds an objective that a script or a notebook defines: a class decorator.

    Each process that reads its runs has to.

    Raises ValueError for a kind that there is, or that its config does not have.
    """
    config, kind = getattr(objective, "config_type", None), getattr(objective, "kind", None)
    is_config = isinstance(config, type) and issubclass(config, ObjectiveConfig) and is_dataclass(config)
    if not is_config or getattr(config, "kind", None) != kind:
        raise ValueError(
            f"{objective.__name__}: config_type must be a dataclass derived from ObjectiveConfig, with the kind "
            f"{kind!r}: give it one"
        )
    _REGISTRY.add(objective)
    return objective


def objective_of(config: ObjectiveConfig, total: Total) -> Objective:
    """The objective that a config names."""
    return objectives()[config.kind](config, total)
