"""One pass of the network: what a caller may ask of it, and what all of its blocks then see alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from model.attention.backends import Backend
from model.attention.kv_cache import KVCache
from model.attention.masks import FrameMask
from model.attention.replay import Trace
from utils.parallel.sequence import FrameShards

Grid = tuple[int, int, int]  # frames, and the tokens of each along height and width


@dataclass(frozen=True)
class PassMode:
    """How a pass is made. A network's forward takes these fields by name.

    positions: absolute frame positions for RoPE; default 0.. or, with a cache, what follows the cached frames.
    rope: their `rope_table`, where it is made already.
    mask: which frames see which; default all see all.
    cache: frames before these. write_cache: the keys and values of these are stored behind them.
    trace: notes this pass, which has no gradient, for a later replay.
    replay: the trace of passes that get their gradient now; x is theirs.
    adapter: the one that is added to the weights, None for none.
    features: blocks, rising from 0, whose outputs come back in place of the velocity; later ones do not run.
    """

    positions: Sequence[int] | None = None
    rope: Tensor | None = None
    mask: FrameMask | None = None
    cache: KVCache | None = None
    write_cache: bool = False
    trace: Trace | None = None
    replay: Trace | None = None
    adapter: str | None = None
    features: Sequence[int] | None = None


@dataclass(frozen=True)
class PassContext:
    """What is the same for every block of one pass, and has no gradient: a block that backward computes again sees it
    as it was, whatever ran in between. Tensors with gradient stay arguments of the block, where FSDP's hooks find them.

    rope: rotation of this rank's tokens [2, L, D / 2].
    grid: the pass's frames, and the tokens of each along height and width.
    backend: the attention backend.
    mask: which frames see which, None for all.
    shards: how the tokens lie on the ranks that share them, None for one rank alone.
    adapter: the one that the weights have beside them in this pass, None for none.
    """

    rope: Tensor
    grid: Grid
    backend: Backend
    mask: FrameMask | None = None
    shards: FrameShards | None = None
    adapter: str | None = None
