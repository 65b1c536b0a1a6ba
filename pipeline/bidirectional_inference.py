"""Many-step sampling of a bidirectional network: the teacher's, and the baseline a student is held against.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from model.schedule import mix, uniform_sigmas, unipc_sigmas, velocity_to_x0, whole_timesteps
from model.score import Condition, ScoreNet
from model.types import Prompt

Guided = float | Sequence[float]  # one guidance, or one for each step (Wan2.2's two experts have one each)


class Solver(Enum):
    """Members are lower case as YAML is."""

    euler = "euler"
    unipc = "unipc"


@torch.no_grad()
def euler_trajectory(
    net: ScoreNet, noise: Tensor, condition: Condition, negative: Prompt, sigmas: Sequence[float], guidance: Guided
) -> Iterator[Tensor]:
    """Integrates dx/dsigma = v by Euler; yields x [B, F, C, H, W] at each level, then at 0.

    net: a many-step network.
    noise: [B, F, C, H, W] at sigmas[0].
    condition: conditioning, or an encoded text [B, L, D] alone.
    negative: the encoded negative prompt, for guidance.
    sigmas: noise levels of the steps, in [0, 1], falling.
    guidance: one scale for all steps, or one for each.
    """
    x = noise.float()
    levels = (*sigmas[1:], 0.0)
    for sigma, target, w in zip(sigmas, levels, _each_step(guidance, sigmas), strict=True):
        yield x
        x = x + (target - sigma) * net.guided_velocity(x, _per_sample(sigma, x), condition, negative, w)
    yield net.finished(x, condition)


@torch.no_grad()
def unipc_trajectory(
    net: ScoreNet,
    noise: Tensor,
    condition: Condition,
    negative: Prompt,
    sigmas: Sequence[float],
    guidance: Guided,
    told: Sequence[float] | None = None,
) -> Iterator[Tensor]:
    """UniPC (arXiv 2302.04867) of order 2, B(h) = e^h - 1, on x0: a predictor, and a corrector without evaluations.

    Yields x [B, F, C, H, W] as predicted at each level, then at 0. Arguments as of `euler_trajectory`, and
    told: noise levels that the network is told instead of the solver's (Wan's pipelines tell it whole timesteps).
    """
    x = start = noise.float()
    # log-SNR is infinite at pure noise
    levels = [min(sigma, 1 - 1e-6) for sigma in sigmas] + [0.0]
    past: list[Tensor] = []  # x0 at the levels so far, the newest last; two are enough
    order = 0
    for step, w in enumerate(_each_step(guidance, sigmas)):
        yield x
        time = _per_sample((told or sigmas)[step], x)
        x0 = velocity_to_x0(x, net.guided_velocity(x, time, condition, negative, w), _per_sample(levels[step], x))
        if step > 0:
            x = _unipc_step(start, past, levels[max(step - 2, 0) : step + 1], order, corrected_by=x0)
        past = [*past, x0][-2:]
        order = min(2, step + 1, len(sigmas) - step)  # the first and the last step have order 1
        start, x = x, _unipc_step(x, past, levels[max(step - 1, 0) : step + 2], order)
    yield net.finished(x, condition)


def _unipc_step(
    x: Tensor, past: Sequence[Tensor], levels: Sequence[float], order: int, corrected_by: Tensor | None = None
) -> Tensor:
    """x at levels[-1] from x at levels[-2] (UniPC, eq. 3 and 9 in x0's form, section 3.4).

    x: [B, F, C, H, W] at levels[-2].
    past: x0 at the levels before the last, the newest last.
    levels: noise levels, the newest last.
    order: the step's order, 1 or 2.
    corrected_by: x0 at the last level, for the corrector.
    """
    sigma_s, sigma_t = levels[-2:]
    if sigma_t == 0:
        return past[-1]
    snr = [math.log1p(-sigma) - math.log(sigma) for sigma in levels]
    h = snr[-1] - snr[-2]
    growth = math.expm1(-h)
    differences, places = [], []  # of x0 to the newest, and where they lie in units of h
    if order == 2:
        differences.append(past[-2] - past[-1])
        places.append((snr[-3] - snr[-2]) / h)
    if corrected_by is not None:
        differences.append(corrected_by - past[-1])
        places.append(1.0)
    out = sigma_t / sigma_s * x - (1 - sigma_t) * growth * past[-1]
    for weight, place, difference in zip(_weights(h, places), places, differences, strict=True):
        out = out - (1 - sigma_t) * growth * weight / place * difference
    return out


def _weights(h: float, places: Sequence[float]) -> list[float]:
    """Weights of the differences: exact for x0 polynomial in log-SNR; a single one is 1/2, as UniPC has it."""
    if len(places) < 2:
        return [0.5] * len(places)
    first = (math.expm1(-h) / -h - 1) / math.expm1(-h)
    second = 2 * ((math.expm1(-h) / -h - 1) / -h - 0.5) / math.expm1(-h)
    before, at = places
    older = (first - second) / (at - before)
    return [older, first - older]


def euler_sample(
    net: ScoreNet, noise: Tensor, condition: Condition, negative: Prompt, sigmas: Sequence[float], guidance: Guided
) -> Tensor:
    """The end of `euler_trajectory`, with its arguments: a sample [B, F, C, H, W]."""
    return deque(euler_trajectory(net, noise, condition, negative, sigmas, guidance), maxlen=1).pop()


def unipc_sample(
    net: ScoreNet,
    noise: Tensor,
    condition: Condition,
    negative: Prompt,
    sigmas: Sequence[float],
    guidance: Guided,
    told: Sequence[float] | None = None,
) -> Tensor:
    """The end of `unipc_trajectory`, with its arguments: a sample [B, F, C, H, W]."""
    return deque(unipc_trajectory(net, noise, condition, negative, sigmas, guidance, told), maxlen=1).pop()


@dataclass(frozen=True)
class SolverGrid:
    """The grid of noise levels that a solver integrates over.

    steps: evaluations (with guidance twice as many).
    shift: s of s u / (1 + (s - 1) u).
    solver: each has its usual grid: UniPC's with whole timesteps is that of Wan's pipelines.
    start: Euler's first noise level.
    """

    steps: int
    shift: float
    solver: Solver = Solver.euler
    start: float = 1.0

    @property
    def sigmas(self) -> tuple[float, ...]:
        match self.solver:
            case Solver.euler:
                return uniform_sigmas(self.steps, self.shift, self.start)
            case Solver.unipc:
                return unipc_sigmas(self.steps, self.shift)


def many_step_sample(
    net: ScoreNet,
    noise: Tensor,
    condition: Condition,
    negative: Prompt,
    *,
    grid: SolverGrid,
    guidance: Guided | Callable[[Sequence[float]], Guided],
    clip: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """A sample [B, F, C, H, W] on the solver's usual grid.

    net: a many-step network.
    noise: [B, F, C, H, W].
    condition: conditioning, or an encoded text [B, L, D] alone.
    negative: the encoded negative prompt, for guidance.
    grid: solver and steps.
    guidance: one, one for each step, or a function of the noise levels that the network is told
    (see `Experts.each_step`).
    clip: [B, F, C, H, W], what the sample starts from instead of noise.
    strength: how much the clip is noised (see `from_clip`).
    """
    sigmas: Sequence[float] = grid.sigmas
    if clip is not None:
        noise, sigmas = from_clip(clip, noise, sigmas, strength)
    told = sigmas if grid.solver is Solver.euler else whole_timesteps(sigmas)
    each = guidance(told) if callable(guidance) else guidance
    if grid.solver is Solver.euler:
        return euler_sample(net, noise, condition, negative, sigmas, each)
    return unipc_sample(net, noise, condition, negative, sigmas, each, told)


def from_clip(
    clip: Tensor, noise: Tensor, sigmas: Sequence[float], strength: float
) -> tuple[Tensor, tuple[float, ...]]:
    """Video-to-video: a clip [B, F, C, H, W] noised to a level of the grid, and the levels from there on.

    strength: the share of the steps to make, in (0, 1]; at 1 the clip is noised to the first level. What comes back is
    the noise and the sigmas of any sampler or rollout here. Raises ValueError for another strength.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} must be in (0, 1]: 1 makes all steps, less keeps more of the clip")
    start = len(sigmas) - max(1, min(int(len(sigmas) * strength), len(sigmas)))
    return mix(clip, noise, _per_sample(sigmas[start], clip)), tuple(sigmas[start:])


def _each_step(guidance: Guided, sigmas: Sequence[float]) -> Sequence[float]:
    each = [guidance] * len(sigmas) if isinstance(guidance, (int, float)) else guidance
    if len(each) != len(sigmas):
        raise ValueError(f"{len(each)} guidances for {len(sigmas)} steps: give one for all, or one for each step")
    return each


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
