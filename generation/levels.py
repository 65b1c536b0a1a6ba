"""The noise levels at which a run's network makes videos of a size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from configs.schema import RunConfig
from configs.sizes import keeps_bounds, leaves_bounds, schedule_at
from model.experts import Experts
from model.schedule import ScheduleConfig, step_sigmas
from utils.errors import UserError


def schedule_of(config: RunConfig, net: nn.Module, shape: Sequence[int], *, few_steps: bool) -> ScheduleConfig:
    """The schedule that a network was trained with, for videos of `shape` (F, C, H, W).

    config: of the network's run.
    net: the network, or the two experts of one.
    shape: frames that are given counted.
    few_steps: whether it makes the schedule's steps.

    Raises UserError where a step would leave the noise levels that it, or its expert, was trained at.
    """
    try:
        scaled = schedule_at(config, shape)
        if few_steps and not _keeps_sides(config.schedule, scaled, net):
            remedy = "choose a length nearer to those that it was trained on"
            raise ValueError(leaves_bounds(config.schedule, scaled, remedy))
    except ValueError as problem:
        raise UserError(f"--frames {shape[0]}: {problem}") from None
    return scaled


def _keeps_sides(own: ScheduleConfig, scaled: ScheduleConfig, net: nn.Module) -> bool:
    if not keeps_bounds(own, scaled):
        return False
    if not isinstance(net, Experts):
        return True
    sides = [[sigma >= net.boundary for sigma in schedule.sigmas()] for schedule in (own, scaled)]
    return sides[0] == sides[1]


def chosen_levels(schedule: ScheduleConfig, steps: int | None) -> tuple[float, ...]:
    """The student's noise levels, or an even choice among them. Raises UserError for more steps than it has."""
    trained = schedule.denoising_step_list
    if steps is None:
        return schedule.sigmas()
    if not 1 <= steps <= len(trained):
        raise UserError(f"--steps {steps}: this student has {len(trained)} steps: choose 1 to {len(trained)}")
    chosen = [trained[i * len(trained) // steps] for i in range(steps)]
    return step_sigmas(chosen, warp=schedule.warp_denoising_step, shift=schedule.timestep_shift)
