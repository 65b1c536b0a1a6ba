"""Causal consistency distillation (Causal Forcing++, arXiv 2605.15141): a few-step start without stored trajectories.

The consistency function f(x_s, s) is where the teacher's probability-flow ODE arrives at sigma 0 (arXiv 2303.01469).
Causal is what the callables see: frames before theirs, clean, in student, average and teacher alike.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.diffusion import Predict
from model.schedule import mix, velocity_to_x0
from model.types import LossOutput, expand_like


def adjacent(index: Tensor, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Noise level `index` (whole numbers, any shape) of falling `levels`, and the next one; after the last comes 0."""
    grid = torch.tensor([*levels, 0.0], dtype=torch.float32, device=index.device)
    return grid[index], grid[index + 1]


def consistency_loss(
    student: Predict,
    average: Predict,
    teacher: Predict,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    huber: float | None = None,
) -> LossOutput:
    """mean (f(x_s) - sg f_average(x_s'))^2, x_s' one Euler step of the teacher from x_s: no ODE data.

    At s' = 0 the target is the teacher's end point itself: f(x, 0) = x.

    student: `(x [B, F, C, H, W], sigma) -> velocity`, as are the next two.
    average: the student's EMA.
    teacher: the causal teacher, whose velocity is already guided.
    clean: x_0 [B, F, C, H, W].
    noise: standard normal, like clean.
    sigma: s, [B] or [B, F]; frames at sigma 0 are given and count for nothing.
    sigma_next: s' < s, like sigma.
    huber: c of sqrt(|d|^2 + c^2) - c over a frame's elements (arXiv 2310.14189) in place of the square; near 0 it is
        the norm |d|. None for the square.
    """
    x = mix(clean, noise, sigma)
    with torch.no_grad():
        step = expand_like(sigma_next, x) - expand_like(sigma, x)
        x_next = x.float() + step * teacher(x, sigma).float()
        target = velocity_to_x0(x_next, average(x_next.to(x.dtype), sigma_next), sigma_next)
    error = (velocity_to_x0(x, student(x, sigma), sigma) - target).flatten(2).square()
    per_frame = error.mean(2) if huber is None else _pseudo_huber(error.sum(2), huber)
    judged = (sigma if sigma.ndim == 2 else sigma[:, None]).expand(per_frame.shape) > 0
    per_sample = (per_frame * judged).sum(1) / judged.sum(1).clamp_min(1)
    loss = per_sample.mean()
    return LossOutput(loss, {"loss": loss.detach()})


def _pseudo_huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c without its cancellation."""
    return square / ((square + c**2).sqrt() + c)
