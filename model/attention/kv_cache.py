"""The key/value cache of a causal rollout: a typed object that no gradient enters.

A pass without gradient puts its keys and values behind the context (`join`), where they fit; `write` keeps them. The
next pass overwrites what was not kept.

B batch  T tokens of a frame  N heads  D head dim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.masks import check_window
from model.attention.rope import apply_rope, frame_turn


@dataclass(frozen=True)
class CacheShape:
    """Geometry of a cache.

    layers, heads, head_dim: the network's.
    batch: videos at once.
    context_frames: the most that it holds beside the block being computed.
    tokens_per_frame: tokens of a latent frame.
    block_frames: room for that block behind them, so that a pass without gradient copies no context.
    """

    layers: int
    batch: int
    context_frames: int
    tokens_per_frame: int
    heads: int
    head_dim: int
    block_frames: int = 0


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is wanted for; its network knows the rest of its `CacheShape`.

    batch: videos at once.
    context_frames: latent frames that it holds beside the block being computed.
    height, width: the latents' size.
    block_frames: latent frames of such a block.
    sinks, rolling, reach: see `KVCache`.
    """

    batch: int
    context_frames: int
    height: int
    width: int
    block_frames: int = 0
    sinks: int = 0
    rolling: bool = False
    reach: int | None = None


class KVCache:
    """Rotated keys and values of the clean frames so far, for every layer.

    The first `sinks` frames stay for good; the others are kept in a ring over the last `context_frames - sinks`.
    Softmax attention does not care about the order of its keys, so a full ring is read as it lies, unless it is
    wanted `in_order` of time: sparse attention makes tiles of neighbouring frames. Keys are rotated before they come
    here, to `position` and on; they see each other by differences of positions only.

    shape: the cache's geometry.
    sinks: see above.
    reach: frames from the first sink to the end of the next block, at most: sinks of a longer video are turned on to
    follow it (`positions`), so that no difference grows beyond what a network was trained with. At least
    `context_frames + block_frames`; None leaves sinks where they were.
    rolling: whether frames may be evicted. Without it overflow is an error, and what `context` returns stays as it is
    until `reset`, so checkpointed blocks may read it again; with it a pass with gradient gets a copy.
    dtype, device: those of keys and values.
    memory: flat and at least as long as it needs to be, in place of its own: for caches of several geometries, of which
    one is in use at a time.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        sinks: int = 0,
        rolling: bool = False,
        in_order: bool = False,
        reach: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        memory: Tensor | None = None,
    ) -> None:
        if sinks > shape.context_frames:
            raise ValueError(f"{sinks} sink frames do not fit a context of {shape.context_frames} frames")
        if reach is not None and reach < shape.context_frames + shape.block_frames:
            raise ValueError(
                f"a reach of {reach} frames is less than the context of {shape.context_frames} and a block of "
                f"{shape.block_frames}"
            )
        self.shape, self.sinks, self.rolling, self.in_order, self.reach = shape, sinks, rolling, in_order, reach
        size = (
            shape.layers,
            2,
            shape.batch,
            (shape.context_frames + shape.block_frames) * shape.tokens_per_frame,
            shape.heads,
            shape.head_dim,
        )
        self._kv = torch.empty(size, dtype=dtype, device=device) if memory is None else _within(memory, size)
        self._text: dict[int, tuple[Tensor, ...]] = {}
        self._fresh: set[int] = set()  # layers whose text is the one at hand
        self.frames = 0
        self.generation = 0
        self._offset, self._first = 0, 0  # of positions against `frames`; the first sink's position, when written
        self._turned_by = 0  # positions that sinks have been moved on
        self._turned_keys: Tensor | None = None  # of sinks as they were written, [layers, B, sinks * T, N, D]
        if reach is not None and rolling and sinks:
            tokens = sinks * shape.tokens_per_frame
            self._turned_keys = self._kv.new_empty((shape.layers, shape.batch, tokens, shape.heads, shape.head_dim))

    @property
    def position(self) -> int:
        """Of the next frame, for its rotation."""
        return self.frames + self._offset

    @property
    def nbytes(self) -> int:
        return self._kv.nbytes + (0 if self._turned_keys is None else self._turned_keys.nbytes)

    @property
    def held_frames(self) -> int:
        return min(self.frames, self.shape.context_frames)

    @property
    def positions(self) -> list[int]:
        """Position, as keys are rotated, of each slot in use."""
        ring = self.shape.context_frames - self.sinks
        oldest = max(self.frames - ring, self.sinks) if ring else self.frames
        out = [-1] * self.held_frames
        for frame in (*range(min(self.sinks, self.frames)), *range(oldest, self.frames)):
            if (slot := self._slot(frame)) is not None:
                out[slot] = frame + self._offset
        sinks = min(self.sinks, self.held_frames)
        return [self._first + i + self._turned_by for i in range(sinks)] + out[sinks:]

    @property
    def in_time(self) -> list[int]:
        """The `positions`, oldest frame first."""
        return sorted(self.positions)

    def reset(self) -> None:
        """Forgets everything but keeps the memory, for the next rollout."""
        self._begin(0, 0)
        self.forget_text()

    def restart(self) -> None:
        """Forgets all keys and values but not where the frames held were: the next pass writes these `in_time` anew,
        all at once, and what follows them goes on at `position`. For another text, say."""
        held = self.in_time
        self._begin(self.position - len(held), held[0] if held else self.position)

    def _begin(self, offset: int, first: int) -> None:
        self.frames, self._offset, self._first = 0, offset, first
        self._turned_by = 0
        self.generation += 1

    def forget_text(self) -> None:
        """The next pass without gradient computes keys and values of its text."""
        self._fresh.clear()

    def context(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """K and V [B, held * T, N, D] that the next block may see, without gradient; None while empty."""
        return self._context(layer, copy=self.rolling and torch.is_grad_enabled())

    def _context(self, layer: int, *, copy: bool) -> tuple[Tensor, Tensor] | None:
        if self.held_frames == 0:
            return None
        kv = self._kv[layer, :, :, : self.held_frames * self.shape.tokens_per_frame]
        if self._turned:
            k, v = torch.cat([kv[:, :, part] for part in self._parts()], 2)
            return k, v
        k, v = kv
        return (k.clone(), v.clone()) if copy else (k, v)

    @property
    def _turned(self) -> bool:
        """Whether frames lie in another order than is wanted."""
        return self.in_order and len(self._parts()) > 2

    def _parts(self) -> list[slice]:
        """The tokens of the frames held, in order of time: sinks, and the ring from its oldest frame on."""
        ring, t = self.shape.context_frames - self.sinks, self.shape.tokens_per_frame
        oldest = self.sinks
        if ring and self.frames > self.shape.context_frames:
            oldest += (self.frames - self.sinks) % ring
        edges = [(0, self.sinks), (oldest, self.held_frames), (self.sinks, oldest)]
        return [slice(a * t, b * t) for a, b in edges[: 3 if oldest > self.sinks else 2]]

    def join(self, layer: int, *, again: bool | None = None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function from a block's own K and V [B, F * T, N, D] to all that it sees: the context before it and itself.

        Without gradient nothing of the context is copied: the block is put behind it in the buffer. With gradient the
        two are concatenated, and the function may be called again in backward, by a checkpointed block; it raises
        RuntimeError if the cache was reset before, where it would silently read another rollout's keys.
        again: whether it may be called later; default: with gradient.
        """
        again = torch.is_grad_enabled() if again is None else again
        if not again:
            return self._in_place(layer)
        context, generation = self._context(layer, copy=self.rolling), self.generation

        def concatenate(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if context is None:
                return k, v
            if not self.rolling and self.generation != generation:
                raise RuntimeError("the KV cache was reset before the backward of a pass that reads it: do that first")
            return torch.cat([context[0], k], 1), torch.cat([context[1], v], 1)

        return concatenate

    def _in_place(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        context = self._context(layer, copy=False) if self._turned else None
        k, v = self._kv[layer]
        return _Behind(k, v, self.held_frames * self.shape.tokens_per_frame, context)

    def stages(self, frames: int) -> bool:
        """Whether a pass without gradient over so many frames leaves its keys and values behind the context, where
        `write` finds them."""
        kept = self.shape.context_frames + self.shape.block_frames
        return self.held_frames + frames <= kept

    def reads_in_place(self, frames: int) -> bool:
        """Whether such a pass sees the context and itself where they lie: nothing is copied, and it can be recorded."""
        return self.stages(frames) and not self._turned

    @torch.no_grad()
    def write(self, frames: int, computed: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        """Stores the keys and values of the `frames` that follow, of all layers at once, and moves on.

        computed: rotated K and V [B, F * T, N, D] of each layer. None: those that the last pass without gradient left
        behind the context (`stages`); while the cache fills up they lie in their place already.
        Raises ValueError when the cache overflows and is not rolling.
        """
        self._check_overflow(frames)
        t = self.shape.tokens_per_frame
        for i in range(frames):
            slot, staged = self._slot(self.frames + i), self.held_frames + i
            if slot is None or (computed is None and slot == staged):
                continue
            place = self._kv[:, :, :, slot * t : (slot + 1) * t]
            if computed is None:
                place.copy_(self._kv[:, :, :, staged * t : (staged + 1) * t])
                continue
            for layer, (k, v) in enumerate(computed):
                place[layer, 0].copy_(k[:, i * t : (i + 1) * t])
                place[layer, 1].copy_(v[:, i * t : (i + 1) * t])
        self.frames += frames
        if self.reach is not None and self._turned_keys is not None:
            self._turn_sinks(self.position + self.shape.block_frames - self.reach - self._first)

    @torch.no_grad()
    def _turn_sinks(self, by: int) -> None:
        if by <= 0 or self._turned_keys is None:
            return
        slots = self._kv[:, 0, :, : self.sinks * self.shape.tokens_per_frame]
        if self._turned_by == 0:
            self._turned_keys.copy_(slots)  # each turn is made of these: rounding does not add up
        turn = frame_turn(by, self.shape.head_dim, self._kv.device)
        for slot, keys in zip(slots, self._turned_keys, strict=True):  # layer by layer: in fp32 they are large
            slot.copy_(apply_rope(keys, turn))
        self._turned_by = by

    def _check_overflow(self, frames: int) -> None:
        if not self.rolling and self.frames + frames > self.shape.context_frames:
            raise ValueError(
                f"KV cache holds {self.shape.context_frames} frames, frame {self.frames + frames} does not fit: "
                "make it larger, or rolling with a window"
            )

    def text(self, layer: int) -> tuple[Tensor, ...] | None:
        """Cross-attention K and V of the text, and of an image where one is given; only in passes without gradient:
        with one they must reach the projections."""
        return None if torch.is_grad_enabled() or layer not in self._fresh else self._text[layer]

    def keep_text(self, layer: int, kv: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() or layer in self._fresh:
            return
        kept = self._text.get(layer)
        if kept is not None and [part.shape for part in kept] == [part.shape for part in kv]:
            for mine, new in zip(kept, kv, strict=True):  # where captured passes look for it
                mine.copy_(new)
        else:
            self._text[layer] = kv
        self._fresh.add(layer)

    @property
    def knows_text(self) -> bool:
        """Whether the next pass without gradient needs no text."""
        return len(self._fresh) == self.shape.layers

    def _slot(self, frame: int) -> int | None:
        if frame < self.shape.context_frames:
            return frame
        ring = self.shape.context_frames - self.sinks
        return self.sinks + (frame - self.sinks) % ring if ring else None


class _Behind:
    """Joins a block's K and V [B, L, N, D] to the `start` tokens before it: puts it behind them in their memory. Where
    it does not fit, or they are wanted in another order (`context`), what the block sees is a copy."""

    def __init__(self, k: Tensor, v: Tensor, start: int, context: tuple[Tensor, Tensor] | None) -> None:
        self.k, self.v, self.start, self.context = k, v, start, context

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.start + k.shape[1]
        fits = end <= self.k.shape[1]
        if fits:
            self.k[:, self.start : end].copy_(k)
            self.v[:, self.start : end].copy_(v)
        if self.context is not None:
            return torch.cat([self.context[0], k], 1), torch.cat([self.context[1], v], 1)
        if fits:
            return self.k[:, :end], self.v[:, :end]
        return torch.cat([self.k[:, : self.start], k], 1), torch.cat([self.v[:, : self.start], v], 1)


def _within(memory: Tensor, size: tuple[int, ...]) -> Tensor:
    if memory.numel() < math.prod(size):
        raise ValueError(f"a KV cache of {math.prod(size)} numbers does not fit a memory of {memory.numel()}")
    return memory[: math.prod(size)].view(size)


def context_frames(total: int, block: int, window: int | None, sinks: int) -> int:
    """How many frames a cache must hold for `total` frames in blocks of `block` under a window of `window` frames.

    The last block is never read back, and a window counts the block being computed. ValueError if it is too small.
    """
    check_window(window, sinks, block)
    needed = max(total - block, 0)
    return needed if window is None else min(needed, window - block)
