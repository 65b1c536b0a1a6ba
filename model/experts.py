"""Two networks that share the noise levels between them, as one network (Wan2.2 A14B).

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

T2V_BOUNDARY, I2V_BOUNDARY = 0.875, 0.9  # of Wan2.2's A14B networks


class Experts(nn.Module):
    """`high` where sigma >= boundary, `low` below: a velocity network as each of them is.

    high, low: networks of one geometry. boundary: in (0, 1), T2V_BOUNDARY and I2V_BOUNDARY for Wan2.2.

    A call whose samples lie on both sides runs both networks, each on its part of the batch: tensors in its mode have a
    row for each sample. Where weights are sharded
    all ranks must run the same networks: keep a call on one side then. Each network is trained alone, within the
    schedule's bounds: `min_score_timestep` is 1000 * boundary for the high one, `max_score_timestep` for the low one.
    The low one's `denoising_step_list` starts at the boundary too, so its rollout must be `noised_data`: it never sees
    pure noise. Raises ValueError for a boundary outside (0, 1), and for a cache: two networks cannot share keys and
    values.
    """

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        super().__init__()
        if not 0 < boundary < 1:
            raise ValueError(f"boundary {boundary} must be a noise level in (0, 1): Wan2.2 has 0.875 (T2V), 0.9 (I2V)")
        self.high, self.low, self.boundary = high, low, boundary

    def forward(self, x: Tensor, sigma: Tensor, **mode: Any) -> Tensor | list[Tensor]:
        """Velocity [B, F, C, H, W] at x, sigma [B] or [B, F]; a sample's side is that of its noisiest frame. With
        `features` in mode the list of what those blocks put out."""
        if mode.get("cache") is not None or mode.get("replay") is not None:
            raise ValueError("two experts cannot share a KV cache: sample them bidirectionally")
        is_high = (sigma if sigma.ndim == 1 else sigma.amax(1)) >= self.boundary
        if bool(is_high.all()) or not bool(is_high.any()):
            return (self.high if bool(is_high.all()) else self.low)(x, sigma, **mode)  # type: ignore[no-any-return]
        rows = [is_high.nonzero().flatten(), (~is_high).nonzero().flatten()]
        parts = [
            net(x[row], sigma[row], **{k: v[row] if isinstance(v, Tensor) else v for k, v in mode.items()})
            for net, row in zip((self.high, self.low), rows, strict=True)
        ]
        order = torch.cat(rows).argsort()
        if isinstance(parts[0], list):
            return [torch.cat(pair)[order] for pair in zip(*parts, strict=True)]
        return torch.cat(parts)[order]

    def fsdp_units(self) -> list[nn.Module]:
        """The modules to shard one by one."""
        return [unit for net in (self.high, self.low) for unit in net.fsdp_units()]  # type: ignore[operator]

    def each_step(self, sigmas: Sequence[float], high: float, low: float) -> list[float]:
        """Each step's guidance, where the experts have one each. sigmas: as told to the network."""
        return [high if sigma >= self.boundary else low for sigma in sigmas]
