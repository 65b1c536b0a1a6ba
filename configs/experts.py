"""Which of a model's two experts, one for each side of a noise level, the student of a run is."""

from __future__ import annotations

from collections.abc import Sequence

from configs.schema import RunConfig
from configs.sizes import schedule_at
from model.network import Expert
from model.objective import objectives

FROM_NOISE = 0.95  # a run whose first step is below this level cannot start from pure noise


def starts_from_noise(config: RunConfig, shape: Sequence[int] | None = None) -> bool:
    """Whether the run's student can be given pure noise for videos of `shape` (None: the data's); a low-noise expert
    cannot."""
    sigmas = schedule_at(config, config.data.size if shape is None else shape).sigmas()
    return sigmas[0] >= FROM_NOISE * config.student.path.start


def expert_of(config: RunConfig) -> Expert | None:
    """Which of a model's two experts the run's student is, None for a whole model. Neither makes a video alone."""
    if config.student.expert is not None:
        return config.student.expert
    if config.few_steps and not starts_from_noise(config):
        return Expert.low
    if config.few_steps and objectives()[config.objective.kind].in_interval:
        return Expert.high
    return None
