"""Sparse self-attention of one network: which of its tiles see which, now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.masks import FrameMask
from model.attention.vsa.attention import SparseBackend, video_sparse_attention
from model.attention.vsa.tiles import CUBES, Grids, Shape
from utils.fields import check_modes
from utils.limits import check_within

Size = tuple[int, int]  # tokens of a frame along height and width


@dataclass
class SparseConfig:
    """Video sparse attention (arXiv 2505.13389) in place of the network's self-attention.

    sparsity: share of key tiles that a tile of queries leaves out.
    cube: a tile's tokens along frames, height and width, 64 in all where kernels compute it (FastWan: [4, 4, 4]); null
        for the one that pads a grid least, which may change as a cache grows.
    backend: what computes it, null for Triton on CUDA and the reference elsewhere.
    ramp_step: sparsity grows from 0 by this every ramp_every iterations (FastVideo: 0.03), null for no ramp.
    ramp_every: iterations between two steps of the ramp (FastVideo: 30).
    """

    sparsity: float = 0.8
    cube: list[int] | None = None
    backend: SparseBackend | None = None
    ramp_step: float | None = None
    ramp_every: int = 30

    def __post_init__(self) -> None:
        check_modes(self)
        check_within(self, sparsity="[0, 1)")
        exact = (
            self.backend is SparseBackend.REFERENCE
            and self.cube is not None
            and len(self.cube) == 3
            and min(self.cube) > 0
        )
        if self.cube is not None and tuple(self.cube) not in CUBES and not exact:
            choices = ", ".join(map(str, CUBES))
            raise ValueError(
                f"cube {self.cube} is not supported: choose among {choices}, or null; any three sides of at least 1 "
                "with backend reference"
            )
        if (self.ramp_step is not None and self.ramp_step <= 0) or self.ramp_every < 1:
            raise ValueError(f"ramp_step must be positive, ramp_every >= 1, got {self.ramp_step}, {self.ramp_every}")

    def at(self, step: int) -> float:
        """The sparsity of iteration `step`, counted from 0."""
        if self.ramp_step is None:
            return self.sparsity
        return min(self.sparsity, self.ramp_step * (step // self.ramp_every))


class Sparsity:
    """A network's sparse attention.

    level: share of key tiles left out. `begin` changes it between iterations, never between a forward and its
    recomputation.
    """

    def __init__(self, config: SparseConfig) -> None:
        self.config, self.level = config, config.sparsity
        self.cube: Shape | None = None if config.cube is None else (config.cube[0], config.cube[1], config.cube[2])
        self.backend = config.backend

    def begin(self, step: int) -> None:
        """From here on as in iteration `step`, counted from 0."""
        self.level = self.config.at(step)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, size: Size, mask: FrameMask | None) -> Tensor:
        """Attention [B, Fq h w, N, D] of whole frames to whole frames.

        q, gate: [B, Fq h w, N, D].
        k, v: [B, Fk h w, N, D].
        size: h and w, tokens of a frame along height and width.
        mask: which frames see which: runs of frames that see the same are attended apart.
        """
        if mask is None:
            return self._run(q, k, v, gate, size)
        tokens = size[0] * size[1]
        out = []
        for queries, runs in mask.segments:
            rows = slice(queries.start * tokens, queries.stop * tokens)
            keys, values = (
                torch.cat([t[:, run.start * tokens : run.stop * tokens] for run in runs], 1) for t in (k, v)
            )
            out.append(self._run(q[:, rows], keys, values, gate[:, rows], size))
        return torch.cat(out, 1)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, size: Size) -> Tensor:
        tokens = size[0] * size[1]
        grids = Grids((q.shape[1] // tokens, *size), (k.shape[1] // tokens, *size), self.cube)
        keys, values = k.to(q.dtype), v.to(q.dtype)
        return video_sparse_attention(q, keys, values, gate, grids, self.level, backend=self.backend)
