"""Videos of several sizes: which there are, the noise schedule of each, and what must fit them.

F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.rollout import SelfForcingConfig
from model.family import FirstFrame
from model.schedule import TIMESTEPS, ScheduleConfig, shift_factor
from model.types import LatentSize
from pipeline.self_forcing_training import rollout_lengths
from utils.limits import VOLUME

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from tasks.data import DataConfig


def sizes_of(config: RunConfig) -> list[LatentSize]:
    """The sizes that training may draw, in the order of `training.sizes`; the data's own size if that is None."""
    return config.drawn_sizes or [config.data.size]


def largest(config: RunConfig) -> LatentSize:
    """The size of the most tokens."""
    return max(sizes_of(config), key=math.prod)


def scales_shift(config: RunConfig) -> bool:
    """Whether the schedule's shifts follow the size of a video."""
    return config.training.sizes is not None and config.training.scale_shift


def shift_factor_of(config: RunConfig, shape: Sequence[int]) -> float:
    """By which the shifts grow for videos of `shape` ([F, C, H, W] or [F, H, W]): 1 for a run of one size, or without
    scaling.

    A causal network's frames count within what it was trained on: it makes each block at the levels of the videos that
    it knows, however many blocks follow.
    """
    if not scales_shift(config):
        return 1.0
    frames, height, width = shape[0], *shape[-2:]
    if config.is_causal:
        known = [size[0] for size in sizes_of(config)]
        frames = min(max(frames, min(known)), max(known))
    return shift_factor((frames, height, width), config.data.size)


def schedule_at(config: RunConfig, shape: Sequence[int]) -> ScheduleConfig:
    """The schedule of videos of `shape` ([F, C, H, W] or [F, H, W]): whatever trains or samples them takes this one.

    Raises ValueError for a shift that is too large.
    """
    return config.schedule.scaled(shift_factor_of(config, shape))


def resize(config: RunConfig, data: DataConfig) -> None:
    """Puts data of another size in place of the run's, whose schedule becomes that of their size.

    Raises ValueError for a size at which the schedule cannot be.
    """
    factor = shift_factor(data.size, config.data.size) if scales_shift(config) else 1.0
    scaled = config.schedule.scaled(factor)
    if config.few_steps and not keeps_bounds(config.schedule, scaled):
        raise ValueError(leaves_bounds(config.schedule, scaled, "choose a size nearer to those that it was trained on"))
    config.data, config.schedule = data, scaled


def trained_frames(config: RunConfig) -> int:
    """Latent frames of the longest video that the run trains on."""
    return max(config.rollout.longest(frames) for frames, _, _ in sizes_of(config))


def check_sizes(config: RunConfig) -> None:
    """Raises ValueError, one line, for a size that networks, blocks, rollouts or data of the run cannot have."""
    if config.training.sizes is None:
        return
    if config.trainer.value == "ode":
        raise ValueError("training.sizes: trainer ode learns from trajectories of the data's own size: set it to null")
    takes_image = config.student.geometry().first_frame is FirstFrame.channels
    rollout = config.rollout
    if takes_image and isinstance(rollout, SelfForcingConfig) and rollout.num_training_frames is not None:
        raise ValueError(
            "rollout.num_training_frames: with training.sizes the channels of an i2v network describe each size's own "
            "frames: set it to null"
        )
    for number, size in enumerate(sizes_of(config)):
        try:
            if math.prod(size) > VOLUME:
                raise ValueError(f"has {math.prod(size)} latent elements, more than {VOLUME}: lower one of its sides")
            _check_size(config, size)
            _check_data(config, size, takes_image)
        except ValueError as problem:
            raise ValueError(f"training.sizes[{number}]: {problem}") from None


def _check_size(config: RunConfig, size: LatentSize) -> None:
    frames, height, width = size
    for network in (config.student, config.teacher, config.critic):
        if network is not None:
            network.geometry().tokens_per_frame(height, width)
    if config.is_causal:
        try:
            config.causal.blocks(frames)
        except ValueError as problem:
            raise ValueError(f"its frames and causal.num_frame_per_block disagree: {problem}") from None
    if config.trainer.value != "score_distillation":
        return
    if config.rollout.longest(frames) != frames:
        rollout_lengths(frames, config.rollout.longest(frames), config.causal.num_frame_per_block)
    scaled = schedule_at(config, size)
    if not keeps_bounds(config.schedule, scaled):
        raise ValueError(leaves_bounds(config.schedule, scaled, "set training.scale_shift to false"))


def keeps_bounds(schedule: ScheduleConfig, scaled: ScheduleConfig) -> bool:
    """Whether steps that lie within the schedule's bounds still do after its shifts were scaled."""
    return _within_bounds(scaled) or not _within_bounds(schedule)


def leaves_bounds(schedule: ScheduleConfig, scaled: ScheduleConfig, remedy: str) -> str:
    return (
        f"scales schedule.timestep_shift {schedule.timestep_shift:g} to {scaled.timestep_shift:.3g}, and a step "
        f"leaves schedule.min_score_timestep and max_score_timestep: {remedy}"
    )


def _within_bounds(schedule: ScheduleConfig) -> bool:
    low, high = schedule.min_score_timestep / TIMESTEPS, schedule.max_score_timestep / TIMESTEPS
    return all(low < sigma <= high for sigma in schedule.sigmas())


def _check_data(config: RunConfig, size: LatentSize, takes_image: bool) -> None:
    (_, height, width), (_, data_height, data_width) = size, config.data.size
    config.data.check_size(size, stored=config.needs_data() is not None, with_image=takes_image)
    if config.objective.reward is not None and (height, width) != (data_height, data_width):
        raise ValueError(f"objective.reward judges {data_height}x{data_width}, not {height}x{width}: vary frames alone")
