"""Ulysses sequence parallelism (arXiv 2309.14509): the process-group mechanics, and nothing of the network.

Outside attention each rank of a group holds some tokens with all heads; inside, all tokens with some heads. A rank's
tokens are its share of *every* frame, not a run of the sequence: so what has one value a frame (time modulation) is
applied as ever, and no rank's run ends in mid-frame.

P ranks of the group  B batch  F frames  T tokens of a frame  t = ceil(T / P) tokens of a frame on one rank
N heads  n = N / P heads on one rank  D head dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor


def check_degree(heads: int, degree: int) -> None:
    """ValueError, naming the legal degrees, unless `degree` ranks can share `heads` attention heads."""
    if degree < 1 or heads % degree:
        legal = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"sequence parallelism over {degree} ranks cannot split {heads} heads: use one of {legal}")


@dataclass(frozen=True)
class SequenceParallel:
    """The ranks that share one sequence, seen from one of them; all of them call the same methods in the same order."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def frames(self, tokens_per_frame: int) -> FrameShards:
        """How frames of `tokens_per_frame` tokens lie on the ranks."""
        return FrameShards(self, tokens_per_frame)


class Splittable(Protocol):
    """A network that runs on its rank's tokens where `sequence` is set. Its inputs and outputs stay whole."""

    sequence: SequenceParallel | None

    @property
    def config(self) -> HasHeads: ...


class HasHeads(Protocol):
    @property
    def num_heads(self) -> int: ...


def apply_sequence_parallel(net: Splittable, group: dist.ProcessGroup) -> None:
    """From now on `net` splits its tokens over the ranks of `group`; a group of one changes nothing.

    All ranks of the group give the network the same inputs and take the same loss from its whole outputs. Gradients of
    parameters are then partial: their SUM over the group is the gradient. Gradients of inputs are whole on every rank.
    Caches made before do not fit: they hold all heads. Raises ValueError unless the group's size divides the heads.
    """
    size = dist.get_world_size(group)
    check_degree(net.config.num_heads, size)
    net.sequence = SequenceParallel(group, dist.get_rank(group), size) if size > 1 else None


@dataclass(frozen=True)
class FrameShards:
    """How the tokens of one forward pass lie on the ranks: t of each frame's T.

    Where P does not divide T the last ranks fill up with padding, which attention never sees and `gather` drops.
    """

    sequence: SequenceParallel
    tokens: int

    @property
    def local(self) -> int:
        return -(-self.tokens // self.sequence.size)

    def split(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, F t, ...] of x [B, F T, ...], the same x on every rank.

        Backward puts the ranks' gradients together: each gets the whole gradient of x.
        """
        out: Tensor = _Split.apply(x, self)
        return out

    def gather(self, x: Tensor) -> Tensor:
        """All tokens [B, F T, ...] of the ranks' x [B, F t, ...].

        Backward takes this rank's tokens of the gradient, which is the same on all ranks, as one loss is counted once.
        """
        out: Tensor = _Gather.apply(x, self)
        return out

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of this rank's tokens [B, F t, N, D] -> of this rank's heads [B, F T, n, D], in one all-to-all."""
        size = self.sequence.size
        send = torch.stack([x.unflatten(2, (size, -1)).movedim(2, 0) for x in parts], 1)  # [P, 3, B, F t, n, D]
        received: Tensor = _AllToAll.apply(send, self.sequence.group)
        frames = received.unflatten(3, (-1, self.local)).movedim(0, 3).flatten(3, 4)  # [3, B, F, P t, n, D]
        return frames[:, :, :, : self.tokens].flatten(2, 3).unbind(0)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: this rank's heads [B, F T, n, D] -> this rank's tokens [B, F t, N, D], in one all-to-all."""
        size = self.sequence.size
        frames = _pad(x.unflatten(1, (-1, self.tokens)), size * self.local)
        send = frames.unflatten(2, (size, -1)).movedim(2, 0).contiguous()  # [P, B, F, t, n, D]
        received: Tensor = _AllToAll.apply(send, self.sequence.group)
        return received.movedim(0, 3).flatten(3, 4).flatten(1, 2)

    def shard(self, x: Tensor) -> Tensor:
        """`split` without its gradient: a slice, padded."""
        start = self.sequence.rank * self.local
        return _pad(x.unflatten(1, (-1, self.tokens))[:, :, start : start + self.local], self.local).flatten(1, 2)

    def whole(self, x: Tensor) -> Tensor:
        """`gather` without its gradient: an all-gather, padding dropped."""
        ranks = x.new_empty(self.sequence.size, *x.shape)
        # the new name came with torch 2.13, which warns at the old one
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(ranks.flatten(0, 1), x.contiguous(), group=self.sequence.group)
        frames = ranks.unflatten(2, (-1, self.local)).movedim(0, 2).flatten(2, 3)  # [B, F, P t, ...]
        return frames[:, :, : self.tokens].flatten(1, 2)


def _pad(x: Tensor, tokens: int) -> Tensor:
    """x [B, F, T, ...] with zeros behind, up to `tokens` tokens a frame."""
    missing = tokens - x.shape[2]
    return functional.pad(x, (0, 0) * (x.ndim - 3) + (0, missing)) if missing else x


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: FrameShards) -> Tensor:
        ctx.shards = shards
        return shards.shard(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.whole(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: FrameShards) -> Tensor:
        ctx.shards = shards
        return shards.whole(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.shard(grad), None


class _AllToAll(torch.autograd.Function):
    """Part i of x [P, ...] goes to rank i, part j of the result came from rank j: its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad.contiguous(), ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
