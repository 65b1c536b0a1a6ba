"""Wan's 3-D rotary position embedding.

F frames  H W token grid  D head dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are split over (frame, height, width): Wan gives height and width 2 (D // 6) each."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(positions: Sequence[int], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and sin, [2, F * H * W, D / 2] fp32, for frames at absolute `positions`.

    Angles are taken in fp64 (a long stream reaches positions where fp32 angles lose digits) and rounded once.
    """
    grids = (positions, range(height), range(width))
    angles = []
    for size, dim in zip(grids, axis_dims(head_dim), strict=True):
        frequency = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(torch.tensor(list(size), dtype=torch.float64), frequency))
    frame, row, column = angles
    f, h, w = len(positions), height, width
    full = torch.cat(
        [
            frame[:, None, None].expand(f, h, w, -1),
            row[None, :, None].expand(f, h, w, -1),
            column[None, None].expand(f, h, w, -1),
        ],
        dim=-1,
    ).reshape(f * h * w, -1)
    return torch.stack([full.cos(), full.sin()]).to(device=device, dtype=torch.float32)


def apply_rope(x_BLND: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs of x by the table's angles (arXiv 2104.09864, eq. 34), in fp32."""
    cos, sin = table[0][None, :, None], table[1][None, :, None]
    even, odd = x_BLND.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BLND)
