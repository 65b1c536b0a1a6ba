"""Cached passes of one shape, recorded once and replayed: on CUDA as a graph, for which the host launches one thing.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from model.attention.kv_cache import KVCache
from model.attention.rope import rope_table

Run = Callable[[], Tensor]
Recorder = Callable[[Run], Run]


class Recordable(Protocol):
    """What a network must say for its passes to be recorded."""

    config: Any
    sequence: Any

    def __call__(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: Any) -> Any: ...


class Captured:
    """A network as `ScoreNet` calls it, whose passes over one cache are recorded by shape and by the frames held.

    Everything that changes between two passes of a shape is in memory that stays where it is: the inputs are copied
    there, the cache and its text are. So a window that is full needs one recording, whatever the length of the video,
    and one more for each number of frames on the way there. What is recorded may write what it computes behind the
    context, and nothing else: storing it (`KVCache.write`) is outside.
    Passes of another kind (a new text's first, a recache, conditioning beside the latents) run as they are. What comes
    back is overwritten by the next pass.

    record: makes of a function of no arguments one that computes the same from the same memory; None: CUDA's graphs.
    Ranks that share a sequence are not for this: raises ValueError.
    """

    def __init__(self, net: Recordable, cache: KVCache, record: Recorder | None = None) -> None:
        if net.sequence is not None:
            raise ValueError("captured passes are one process's: leave sequence parallelism, or run them as they are")
        self.net, self.cache = net, cache
        self.record = _CudaGraphs() if record is None else record
        self.recorded: dict[tuple[object, ...], _Pass] = {}

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        cache: KVCache | None = None,
        write_cache: bool = False,
        **beside: Any,
    ) -> Tensor:
        """Velocity [B, F, C, H, W], as the network gives it.

        x: latents [B, F, C, H, W].
        sigma: noise level [B] or [B, F].
        text: [B, M, D]; the cache knows its keys and values.
        cache: the one whose passes are recorded; others run as they are.
        write_cache: the keys and values of these frames are stored behind the others.
        beside: what else the network takes; such a pass runs as it is.
        """
        frames = x.shape[1]
        is_plain = cache is self.cache and not beside and not torch.is_grad_enabled()
        if not is_plain or not self.cache.knows_text or not self.cache.reads_in_place(frames):
            out: Tensor = self.net(x, sigma, text, cache=cache, write_cache=write_cache, **beside)
            return out
        key = (self.cache.held_frames, x.shape, x.dtype, sigma.shape)
        if key not in self.recorded:
            self.recorded[key] = _Pass(self.net, self.cache, self.record, x, sigma, text)
        velocity = self.recorded[key](x, sigma)
        if write_cache:
            self.cache.write(frames)
        return velocity


class _Pass:
    """A recording, and the memory of its inputs."""

    def __init__(
        self, net: Recordable, cache: KVCache, record: Recorder, x: Tensor, sigma: Tensor, text: Tensor
    ) -> None:
        self.net, self.cache = net, cache
        self.x, self.sigma, self.text = x.clone(), sigma.clone(), text.clone()  # the text is checked, and not read
        self.rope, self.position = self._rope(), cache.position
        self.run = record(lambda: net(self.x, self.sigma, self.text, rope=self.rope, cache=cache))

    def _rope(self) -> Tensor:
        config, (frames, _, height, width) = self.net.config, self.x.shape[1:]
        _, ph, pw = config.patch_size
        positions = range(self.cache.position, self.cache.position + frames)
        return rope_table(positions, height // ph, width // pw, config.head_dim, self.x.device)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.x.copy_(x)
        self.sigma.copy_(sigma)
        if self.position != self.cache.position:
            self.rope.copy_(self._rope())
            self.position = self.cache.position
        return self.run()


class _CudaGraphs:
    """Records into graphs that share one pool of memory: they run one after the other."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Run) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what compiles, tunes or allocates for good does so before
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        self.pool = self.pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
