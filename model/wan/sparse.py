"""Sparse self-attention of one network: which of its tiles see which, now."""

from __future__ import annotations

import torch
from torch import Tensor

from model.wan.config import SparseConfig
from model.wan.masks import FrameMask
from model.wan.vsa.attention import video_sparse_attention
from model.wan.vsa.tiles import Grids, Shape

Size = tuple[int, int]  # tokens of a frame along height and width


class Sparsity:
    """A network's sparse attention.

    level: share of key tiles left out. `begin` changes it between iterations, never between a forward and its
    recomputation.
    """

    def __init__(self, config: SparseConfig) -> None:
        self.config, self.level = config, config.sparsity
        self.cube: Shape | None = None if config.cube is None else (config.cube[0], config.cube[1], config.cube[2])
        self.backend = config.chosen

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
