"""Wan's 3-D rotary position embedding.

F frames  H W token grid  D head dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are split over (frame, height, width): Wan gives height and width 2 (D // 6) each."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(positions: Sequence[int], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and sin, [2, F * H * W, D / 2] fp32.

    positions: each frame's absolute position.
    height, width: a frame's size in tokens.
    head_dim: D.
    device: where the table is wanted.
    Angles are taken in fp64 (a long stream reaches positions where fp32 angles lose digits) and rounded once.
    """
    f, h, w = len(positions), height, width
    places = [_places(axis, device) for axis in (positions, range(h), range(w))]
    parts = []
    for axis, (size, dim) in enumerate(zip(places, axis_dims(head_dim), strict=True)):
        angle = torch.outer(size, _frequencies(dim, device))
        small = torch.stack([angle.cos(), angle.sin()]).float()  # only the axis' own entries, then spread over the grid
        shape = [2, 1, 1, 1, dim // 2]
        shape[1 + axis] = len(size)
        parts.append(small.reshape(shape).expand(2, f, h, w, -1))
    return torch.cat(parts, dim=-1).reshape(2, f * h * w, -1)


def frame_turn(by: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and sin, [2, 1, D / 2] fp32, that move rotated keys on by so many frames: R(p + by) = R(by) R(p)."""
    frame, height, width = axis_dims(head_dim)
    angle = functional.pad(_frequencies(frame, device) * by, (0, (height + width) // 2))
    return torch.stack([angle.cos(), angle.sin()]).float()[:, None]


def _frequencies(dim: int, device: torch.device) -> Tensor:
    return THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def _places(axis: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(axis, range):  # made on the device: nothing has to be copied there, and waited for
        return torch.arange(axis.start, axis.stop, axis.step, dtype=torch.float64, device=device)
    return torch.tensor(axis, dtype=torch.float64, device=device)


def apply_rope(x_BLND: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs of x by the table's angles (arXiv 2104.09864, eq. 34), in fp32."""
    if torch.compiler.is_compiling():  # Inductor makes no code for complex numbers, but one kernel of this
        even, odd = x_BLND.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table[0][None, :, None], table[1][None, :, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x_BLND)
    # as complex numbers: one pass over memory each way, where cosines and sines by hand take seven
    pairs = torch.view_as_complex(x_BLND.float().unflatten(-1, (-1, 2)))
    turns = torch.complex(table[0], table[1])[None, :, None]
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x_BLND)
