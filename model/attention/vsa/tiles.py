"""Video tokens as tiles: cubes of neighbouring tokens that sparse attention keeps or leaves as a whole (2505.13389).

B batch  L tokens in raster order of a grid (F, H, W)  N heads  D head dim  n tiles  T slots of a tile
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Shape = tuple[int, int, int]  # frames, height, width in tokens

# 64 tokens each, no side of the picture over four times the other; the most compact first: it wins among equals
CUBES: tuple[Shape, ...] = (
    (4, 4, 4), (2, 4, 8), (2, 8, 4), (4, 2, 8), (4, 8, 2), (1, 8, 8), (8, 2, 4), (8, 4, 2), (1, 4, 16), (1, 16, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """A grid of tokens cut into cubes: tiles in raster order, raster within a tile, ragged at the far edges.

    A tile of v valid tokens has them in its first v slots; the rest of its T slots is padding.
    Raises ValueError for sides below 1.
    """

    grid: Shape
    cube: Shape

    def __post_init__(self) -> None:
        for name, shape in (("grid", self.grid), ("cube", self.cube)):
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError(f"{name} {shape} of sparse attention: three sides of at least 1 token are needed")

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def slots(self) -> int:
        """Token slots in one tile (T)."""
        return math.prod(self.cube)

    @property
    def tiles(self) -> int:
        """Number of tiles (n)."""
        return math.prod(self._along)

    @property
    def padding(self) -> float:
        """Share of padded slots on top of the tokens: 0.22 is 22 % more work than tokens."""
        return self.tiles * self.slots / self.tokens - 1

    @property
    def _along(self) -> Shape:
        f, h, w = (-(-side // edge) for side, edge in zip(self.grid, self.cube, strict=True))
        return f, h, w

    @cached_property
    def _slot_of_token(self) -> Tensor:
        """int64 [L]: where each token goes in the n * T slots."""
        starts, inside, widths = [], [], []
        for side, edge in zip(self.grid, self.cube, strict=True):
            index = torch.arange(side)
            starts.append(index // edge)
            inside.append(index % edge)
            widths.append(
                (side - index // edge * edge).clamp(max=edge)
            )  # of the token's tile: ragged ones are narrower
        _, tall, wide = self._along
        tile = (_frames(starts[0]) * tall + _rows(starts[1])) * wide + starts[2]
        place = (_frames(inside[0]) * _rows(widths[1]) + _rows(inside[1])) * widths[2] + inside[2]
        return (tile * self.slots + place).flatten()

    @cached_property
    def _counts(self) -> Tensor:
        """int64 [n]: valid tokens of each tile."""
        return torch.bincount(self._slot_of_token // self.slots, minlength=self.tiles)


def _frames(x: Tensor) -> Tensor:
    return x[:, None, None]


def _rows(x: Tensor) -> Tensor:
    return x[:, None]


@dataclass(frozen=True)
class TileMaps:
    """A tiling's index tensors on one device."""

    slot_of_token: Tensor  # int64 [L]
    token_of_slot: Tensor  # int32 [n * T], -1 in padding
    counts: Tensor  # int32 [n], valid tokens of each tile
    valid: Tensor  # bool [n, T]


@lru_cache(maxsize=64)  # keyed by grid and cube: another shape never reuses a map
def tile_maps(tiling: Tiling, device: torch.device) -> TileMaps:
    """The maps between tokens and slots, made once per tiling and device."""
    # cached: a map made during inference is also saved for a later backward, and one made in a plan has values
    with torch.inference_mode(False), unset_fake_temporarily():
        slots = tiling._slot_of_token
        tokens = torch.full((tiling.tiles * tiling.slots,), -1, dtype=torch.int32)
        tokens[slots] = torch.arange(tiling.tokens, dtype=torch.int32)
        valid = (tokens >= 0).view(tiling.tiles, tiling.slots)
        on = (t.to(device) for t in (slots, tokens, tiling._counts.int(), valid))
        return TileMaps(*on)


@lru_cache(maxsize=64)
def choose_cube(grid: Shape, key_grid: Shape | None = None, cubes: tuple[Shape, ...] = CUBES) -> Shape:
    """The cube with the smallest padded query slots x key slots. Ties go to the first of `cubes`."""

    def pairs(cube: Shape) -> int:
        queries, keys = Tiling(grid, cube), Tiling(key_grid or grid, cube)
        return queries.tiles * queries.slots * keys.tiles * keys.slots

    return min(cubes, key=pairs)


@dataclass(frozen=True)
class Grids:
    """The grids (frames, height, width) that tokens lie in, in raster order.

    queries, keys: keys None means the same grid as queries. With a cache, keys count the cached frames too.
    cube: a tile's tokens along each side, None for the one that pads the two grids least.
    """

    queries: Shape
    keys: Shape | None = None
    cube: Shape | None = None

    def tilings(self) -> tuple[Tiling, Tiling]:
        """Of queries and of keys. Raises ValueError for sides below 1."""
        keys = self.queries if self.keys is None else self.keys
        cube = self.cube or choose_cube(self.queries, keys)
        return Tiling(self.queries, cube), Tiling(keys, cube)


def kept_tiles(sparsity: float, tiles: int) -> int:
    """K = clamp(ceil((1 - sparsity) tiles), 1, tiles), with a tolerance, so that 0.7 of 10 keeps 3 despite rounding.

    Raises ValueError for a sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity} of sparse attention: between 0 (all tiles kept) and 1 is needed")
    return min(max(math.ceil((1 - sparsity) * tiles - 1e-9), 1), tiles)


def to_tiles(x_BLND: Tensor, tiling: Tiling) -> Tensor:
    """Tokens [B, L, N, D] -> tiles [B, N, n, T, D], padding zero."""
    maps = tile_maps(tiling, x_BLND.device)
    batch, _, heads, width = x_BLND.shape
    slots = x_BLND.new_zeros(batch, tiling.tiles * tiling.slots, heads, width)
    slots = slots.index_copy(1, maps.slot_of_token, x_BLND)
    return slots.unflatten(1, (tiling.tiles, tiling.slots)).permute(0, 3, 1, 2, 4)


def to_tokens(x_BNnTD: Tensor, tiling: Tiling) -> Tensor:
    """Tiles [B, N, n, T, D] -> tokens [B, L, N, D]; what padding holds is dropped."""
    slots = x_BNnTD.permute(0, 2, 3, 1, 4).flatten(1, 2)
    return slots.index_select(1, tile_maps(tiling, x_BNnTD.device).slot_of_token)
