"""ScoreNet: a velocity network seen as an x0 predictor, and the one classifier-free-guidance convention.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.schedule import velocity_to_x0
from model.types import Evaluations


class ScoreNet:
    """x0 prediction of a velocity network, with its evaluations counted and its precision set at the call.

    net: callable `(x_BFCHW, sigma [B] | [B, F], text_BLD, **mode) -> velocity [B, F, C, H, W]`.
    compute_dtype: bf16 runs the network under autocast; None leaves it in its own precision. The autocast context
    is entered anew at each call: its weight cache, filled without gradient by a rollout's early steps, would
    otherwise cut the exit step off from the weights.
    batch_guidance: with and without prompt in one call, so that sharded weights are gathered once; apart they need half
    the activations.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        evaluations: Evaluations | None = None,
        compute_dtype: torch.dtype | None = None,
        batch_guidance: bool = True,
    ) -> None:
        self.net = net
        self.name = name
        self.evaluations = evaluations if evaluations is not None else Evaluations()
        self.compute_dtype = compute_dtype
        self.batch_guidance = batch_guidance

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: Any) -> Tensor:
        """Velocity [B, F, C, H, W] in fp32 at x [B, F, C, H, W], sigma [B] or [B, F], text [B, L, D]."""
        self.evaluations.add(self.name, frames=x.shape[0] * x.shape[1])
        return self._run(x, sigma, text, **mode)

    def _run(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: Any) -> Tensor:
        with torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            velocity = self.net(x, sigma, text, **mode)
        return velocity.float()

    def x0(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: Any) -> Tensor:
        """Conditional x0 [B, F, C, H, W], fp32."""
        return velocity_to_x0(x, self.velocity(x, sigma, text, **mode), sigma)

    def x0_again(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: Any) -> Tensor:
        """x0 of evaluations that were made, and counted, before: a replay gives them their gradient."""
        return velocity_to_x0(x, self._run(x, sigma, text, **mode), sigma)

    def guided_velocity(
        self, x: Tensor, sigma: Tensor, text: Tensor, negative: Tensor, guidance: float, **mode: Any
    ) -> Tensor:
        """uncond + w (cond - uncond) (arXiv 2207.12598) in one batched call, or in two.

        `guidance` 1 is the plain conditional network and costs one evaluation, not two.
        """
        if guidance == 1.0:
            return self.velocity(x, sigma, text, **mode)
        if self.batch_guidance:
            both = self.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([text, negative]), **mode)
            cond, uncond = both.chunk(2)
        else:
            cond, uncond = self.velocity(x, sigma, text, **mode), self.velocity(x, sigma, negative, **mode)
        return uncond + guidance * (cond - uncond)

    def guided_x0(
        self, x: Tensor, sigma: Tensor, text: Tensor, negative: Tensor, guidance: float, **mode: Any
    ) -> Tensor:
        """x0 of `guided_velocity`; guiding x0 or velocity is the same, x0 being affine in it."""
        return velocity_to_x0(x, self.guided_velocity(x, sigma, text, negative, guidance, **mode), sigma)
