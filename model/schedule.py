"""The flow schedule: pure functions of sigma in [0, 1], all in fp32.

x_sigma = (1 - sigma) x0 + sigma eps,  v = eps - x0,  x0 = x_sigma - sigma v   (rectified flow, arXiv 2209.03003)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from model.types import at_least_fp32, expand_like
from utils.limits import SHIFT

Number = TypeVar("Number", float, Tensor)

TIMESTEPS = 1000.0  # the network's time embedding and YAML step lists count 0..1000; nothing else does


def shift_sigma(u: Number, shift: float) -> Number:
    """s u / (1 + (s - 1) u): moves uniform noise levels towards noise (SD3, arXiv 2403.03206, eq. 23).

    A tensor comes back in fp32, or in fp64 where it is that.
    """
    u = at_least_fp32(u) if isinstance(u, Tensor) else u
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Number, shift: float) -> Number:
    """The inverse of `shift_sigma`."""
    sigma = at_least_fp32(sigma) if isinstance(sigma, Tensor) else sigma
    return sigma / (shift - (shift - 1) * sigma)


def mix(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma for x0, noise [B, F, ...] and sigma [B] or [B, F]. Returns x0's dtype."""
    s = expand_like(sigma, x0)
    return ((1 - s) * x0.float() + s * noise.float()).to(x0.dtype)


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x - sigma v, in fp32. Exact at sigma 0 too: nothing is divided."""
    return x.float() - expand_like(sigma, x) * velocity.float()


def step_sigmas(timesteps: Sequence[float], *, warp: bool, shift: float) -> tuple[float, ...]:
    """A YAML step list (1000 = pure noise) as noise levels; `warp` passes them through the shift.

    [1000, 750, 500, 250] warped by 5 is 1, 0.9375, 0.8333, 0.625 (Self-Forcing's steps).
    Raises ValueError unless the list is strictly decreasing within (0, 1000].
    """
    ordered = all(a > b for a, b in itertools.pairwise(timesteps))
    if not timesteps or not ordered or timesteps[0] > TIMESTEPS or timesteps[-1] <= 0:
        raise ValueError(f"denoising_step_list must strictly decrease within (0, 1000], got {list(timesteps)}")
    return tuple(shift_sigma(t / TIMESTEPS, shift) if warp else t / TIMESTEPS for t in timesteps)


def uniform_sigmas(steps: int, shift: float, start: float = 1.0) -> tuple[float, ...]:
    """`steps` shifted levels from `start` towards 0, without the final 0: the grid of a many-step Euler sampler."""
    return tuple(start * shift_sigma(1 - i / steps, shift) for i in range(steps))


def unipc_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` levels of Wan's UniPC sampler (Diffusers' UniPCMultistepScheduler with flow sigmas), without the final 0:
    evenly from 1 towards 1/1000, shifted; pure noise is 1 - 1e-6, where log-SNR is finite."""
    levels = [shift_sigma(1 + i * ((1 / TIMESTEPS - 1) / steps), shift) for i in range(steps)]
    return tuple(level - 1e-6 if abs(level - 1) < 1e-6 else level for level in levels)


def flow_match_euler_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` levels of Diffusers' FlowMatchEulerDiscreteScheduler, without the final 0. It counts down to the shifted
    level of timestep 1, and shifts what it counted: its last levels are noisier than `uniform_sigmas`'."""
    last = shift_sigma(1 / TIMESTEPS, shift)
    return tuple(shift_sigma(1 + i * ((last - 1) / max(steps - 1, 1)), shift) for i in range(steps))


def whole_timesteps(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Levels as Wan's UniPC tells them to the network: timesteps without their fraction."""
    return tuple(int(sigma * TIMESTEPS) / TIMESTEPS for sigma in sigmas)


def score_sigma(u: Tensor, *, shift: float, low: float, high: float, clamp: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """The noise level at which a score is taken, fp32: u ~ U[0, 1] -> shifted, within [low, high], then clamped.

    u: [B].
    shift: s of `shift_sigma`.
    low, high: bounds of sigma itself (min_score_timestep, ts_schedule, ts_schedule_max): u is stretched over
        [unshift(low), unshift(high)], so the shifted density is the same one, truncated.
    clamp: least and greatest sigma, after the shift.
    """
    a, b = unshift_sigma(low, shift), unshift_sigma(high, shift)
    return shift_sigma(a + (b - a) * u.to(torch.float32), shift).clamp(*clamp)


def shift_factor(size: Sequence[int], usual: Sequence[int]) -> float:
    """sqrt(tokens / usual tokens), for videos of latent (F, H, W) in place of those that a shift was chosen for
    (SD3, arXiv 2403.03206, eq. 23).

    Neighbouring tokens resemble each other, so more tokens need more noise to hide the same content. The size of
    patches cancels out.
    """
    return math.sqrt(math.prod(size) / math.prod(usual))


@dataclass
class ScheduleConfig:
    """Noise levels of the student's steps, of the scores and of flow-matching training. Timesteps count 0..1000.

    denoising_step_list: the student's steps.
    warp_denoising_step: pass them through timestep_shift.
    timestep_shift: of the student's steps and of flow-matching training.
    score_timestep_shift: of the noise level at which scores are taken and the critic is trained.
    min_sigma, max_sigma: that level's clamp.
    min_score_timestep, max_score_timestep: that level's bounds, and those of a bidirectional network's flow-matching
        training: they keep one of two experts (model/experts.py) within its own noise levels.
    ts_schedule: bounds that level from below by the level that the exit step leads to, in place of min_score_timestep.
    ts_schedule_max: bounds it from above by the level that the exit step starts at.
    """

    denoising_step_list: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    warp_denoising_step: bool = True
    timestep_shift: float = 5.0
    score_timestep_shift: float = 5.0
    min_sigma: float = 0.02
    max_sigma: float = 0.98
    min_score_timestep: float = 0.0
    max_score_timestep: float = TIMESTEPS
    ts_schedule: bool = False
    ts_schedule_max: bool = False

    def __post_init__(self) -> None:
        for name, shift in (
            ("timestep_shift", self.timestep_shift),
            ("score_timestep_shift", self.score_timestep_shift),
        ):
            if shift <= 0:
                raise ValueError(f"{name} must be positive (1 = none), got {shift}")
            if shift > SHIFT:
                raise ValueError(f"{name} must be at most {SHIFT}, where all levels are noise, got {shift}: lower it")
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise ValueError(
                f"min_sigma and max_sigma must satisfy 0 <= min < max <= 1, got {self.min_sigma} and {self.max_sigma}"
            )
        if not 0 <= self.min_score_timestep < TIMESTEPS:
            raise ValueError(f"min_score_timestep must be in [0, 1000), got {self.min_score_timestep}")
        if self.min_score_timestep / TIMESTEPS >= self.max_sigma:
            raise ValueError(f"min_score_timestep {self.min_score_timestep} is not below max_sigma {self.max_sigma}")
        if not self.min_score_timestep < self.max_score_timestep <= TIMESTEPS:
            raise ValueError(
                f"max_score_timestep must be above min_score_timestep {self.min_score_timestep} and at most 1000, got "
                f"{self.max_score_timestep}"
            )
        if self.max_score_timestep / TIMESTEPS <= self.min_sigma:
            raise ValueError(f"max_score_timestep {self.max_score_timestep} is not above min_sigma {self.min_sigma}")
        self.sigmas()

    def scaled(self, factor: float) -> ScheduleConfig:
        """The same with both shifts `factor` times as large."""
        shifts = self.timestep_shift * factor, self.score_timestep_shift * factor
        return replace(self, timestep_shift=shifts[0], score_timestep_shift=shifts[1])

    def sigmas(self) -> tuple[float, ...]:
        """The student's step list as noise levels."""
        return step_sigmas(self.denoising_step_list, warp=self.warp_denoising_step, shift=self.timestep_shift)

    def score_sigma(self, u: Tensor, sigma_from: float | None = None, sigma_to: float | None = None) -> Tensor:
        """Noise level [B] of a score from u ~ U[0, 1], given the levels between which the rollout's exit step went."""
        low, high = self._bounds()
        if self.ts_schedule and sigma_to is not None:
            low = sigma_to
        if self.ts_schedule_max and sigma_from is not None:
            high = min(sigma_from, high)
        return score_sigma(
            u, shift=self.score_timestep_shift, low=low, high=high, clamp=(self.min_sigma, self.max_sigma)
        )

    def training_sigma(self, u: Tensor) -> Tensor:
        """Noise level of bidirectional flow-matching training from u ~ U[0, 1]."""
        low, high = self._bounds()
        return score_sigma(u, shift=self.timestep_shift, low=low, high=high)

    def _bounds(self) -> tuple[float, float]:
        return self.min_score_timestep / TIMESTEPS, self.max_score_timestep / TIMESTEPS
