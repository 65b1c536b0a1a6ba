"""Flow matching: the loss of teachers, of causal initialisation, and of the critic.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.schedule import mix, velocity_to_x0
from model.types import LossOutput, expand_like

Predict = Callable[[Tensor, Tensor], Tensor]


def flow_matching_loss(
    predict: Predict,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    weight: Tensor | None = None,
    x0_target: bool = False,
) -> LossOutput:
    """mean (v - (eps - x0))^2 at x_sigma (arXiv 2210.02747, eq. 14), or with `x0_target` mean (x0_pred - x0)^2.

    predict: `(x_sigma [B, F, C, H, W], sigma) -> velocity`.
    x0: [B, F, C, H, W].
    noise: eps, standard normal, like x0.
    sigma: [B] or [B, F], noise levels in [0, 1].
    weight: [B] or [B, F], 0 leaves a frame out; the mean of each sample is over its weights, so samples count alike.
    x0_target: the error is that of x0 in place of the velocity's.
    """
    x_sigma = mix(x0, noise, sigma)
    velocity = predict(x_sigma, sigma)
    if x0_target:
        error = velocity_to_x0(x_sigma, velocity, sigma) - x0.float()
    else:
        error = velocity.float() - (noise.float() - x0.float())
    if weight is None:
        per_sample = error.square().flatten(1).mean(1)
    else:
        w = expand_like(weight, error).expand_as(error).flatten(1)
        per_sample = (error.square().flatten(1) * w).sum(1) / w.sum(1).clamp_min(torch.finfo(w.dtype).tiny)
    return LossOutput(per_sample.mean(), {"loss": per_sample.detach().mean()})
