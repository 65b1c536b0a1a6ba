"""Training on videos of several sizes: which there are, and how the noise schedule follows.

F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from configs.video_size import Size
from model.family import FirstFrame
from model.schedule import TIMESTEPS, ScheduleConfig
from pipeline.self_forcing_training import rollout_lengths
from utils.limits import VOLUME

if TYPE_CHECKING:
    from configs.schema import RunConfig


def sizes_of(config: RunConfig) -> list[Size]:
    """The sizes that training may draw, in the order of `training.sizes`; the data's own size if that is None."""
    frames, height, width = config.data.size
    if config.training.sizes is None:
        return [(frames, height, width)]
    return [(s.frames or frames, s.height or height, s.width or width) for s in config.training.sizes]


def largest(config: RunConfig) -> Size:
    """The size of the most tokens."""
    return max(sizes_of(config), key=math.prod)


def shift_factor(config: RunConfig, shape: Sequence[int]) -> float:
    """sqrt(tokens / tokens of the data's own size) of videos of `shape` (F, C, H, W) (SD3, arXiv 2403.03206, eq. 23).

    Neighbouring tokens resemble each other, so more tokens need more noise to hide the same content. The size of
    patches cancels out. The factor is 1 if `training.sizes` is None or `training.scale_shift` false.
    """
    if config.training.sizes is None or not config.training.scale_shift:
        return 1.0
    frames, _, height, width = shape
    return math.sqrt(frames * height * width / math.prod(config.data.size))


def schedule_at(config: RunConfig, shape: Sequence[int]) -> ScheduleConfig:
    """The schedule for videos of `shape` (F, C, H, W)."""
    return config.schedule.scaled(shift_factor(config, shape))


def check_sizes(config: RunConfig) -> None:
    """Raises ValueError, one line, for a size that networks, blocks, rollouts or data of the run cannot have."""
    if config.training.sizes is None:
        return
    if config.trainer.value == "ode":
        raise ValueError("training.sizes: trainer ode learns from trajectories of the data's own size: set it to null")
    takes_image = config.student.geometry().first_frame is FirstFrame.channels
    if takes_image and config.rollout.num_training_frames is not None:
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


def _check_size(config: RunConfig, size: Size) -> None:
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
    longest = config.rollout.num_training_frames
    if longest is not None:
        rollout_lengths(frames, longest, config.causal.num_frame_per_block)
    schedule, scaled = config.schedule, schedule_at(config, (frames, 0, height, width))
    if _within_bounds(schedule) and not _within_bounds(scaled):
        raise ValueError(
            f"scales schedule.timestep_shift {schedule.timestep_shift:g} to {scaled.timestep_shift:.3g}, and a step "
            "leaves schedule.min_score_timestep and max_score_timestep: set training.scale_shift to false"
        )


def _within_bounds(schedule: ScheduleConfig) -> bool:
    low, high = schedule.min_score_timestep / TIMESTEPS, schedule.max_score_timestep / TIMESTEPS
    return all(low < sigma <= high for sigma in schedule.sigmas())


def _check_data(config: RunConfig, size: Size, takes_image: bool) -> None:
    data, (frames, height, width) = config.data, size
    data_frames, data_height, data_width = data.size
    same = (height, width) == (data_height, data_width)
    if data.kind == "digits" and size != data.size:
        raise ValueError("data.kind digits has images of one size: set training.sizes to null")
    if data.kind == "toy":
        if height != width:
            raise ValueError(f"the toy world is square, not {height}x{width}: give one height and width")
        replace(data.toy, frames=frames, canvas=2 * height)
        if config.objective.reward is not None and not same:
            raise ValueError(
                f"objective.reward judges {data_height}x{data_width}, not {height}x{width}: vary frames alone"
            )
    videos = data.kind == "wan" and data.latents is not None and config.needs_data() is not None
    images = data.kind == "wan" and data.images is not None
    if images and not same:
        raise ValueError(
            f"{height}x{width} is not the {data_height}x{data_width} of data.wan, in which data.images was stored: "
            "vary frames alone"
        )
    if (videos or (images and takes_image)) and frames > data_frames:
        key = "data.latents" if videos else "data.images"
        raise ValueError(f"{frames} frames of {key}, which gives {data_frames} (data.wan.frames): choose fewer")
