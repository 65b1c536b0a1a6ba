"""Video sparse attention with FlexAttention over the kept tiles. Its backward needs CUDA.

B batch  N heads  n query tiles  m key tiles  T slots of a tile  K kept key tiles
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.attention.vsa.reference import coarse_attention, select_tiles, spread, tile_means
from model.attention.vsa.tiles import Tiling, tile_maps, to_tiles, to_tokens


def flex(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, queries: Tiling, keys: Tiling, kept: int) -> Tensor:
    """O_f + gate * O_c; see video_sparse_attention.

    q, gate: [B, L, N, D].
    k, v: [B, M, N, D].
    queries, keys: tilings of the L and of the M tokens.
    kept: key tiles of each query tile.

    Raises ValueError where a gradient is asked for on a CPU.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("sparse attention 'flex' has no backward on a CPU: train with 'reference' here")
    q_tiles, k_tiles, v_tiles = to_tiles(q, queries), to_tiles(k, keys), to_tiles(v, keys)
    q_mean, k_mean, v_mean = (
        tile_means(t.float(), tiling) for t, tiling in ((q_tiles, queries), (k_tiles, keys), (v_tiles, keys))
    )
    scores, coarse = coarse_attention(q_mean, k_mean, v_mean)
    has_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    mask = kept_block_mask(
        select_tiles(scores, kept), queries, keys, tiles_of_a_block(q.dtype, queries.slots) if has_backward else 1
    )
    flat = (t.flatten(2, 3) for t in (q_tiles, k_tiles, v_tiles))
    options = kernel_options(q.dtype, queries.slots) if q.device.type == "cuda" else None
    fine = _compiled_flex(q.is_cuda)(*flat, block_mask=mask, kernel_options=options)
    fine = to_tokens(fine.unflatten(2, (queries.tiles, queries.slots)), queries)
    return (fine.float() + gate.float() * spread(coarse, queries)).type_as(q)


# the kernels' own blocks, forward and backward, have to divide a tile: they are one tile
BLOCK_OPTIONS = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
# Inductor has a 16-bit backward only for masks whose blocks its default blocks divide, whatever BLOCK_OPTIONS say:
# these are 64 x 128 on Hopper and Blackwell, up to 32 x 128 elsewhere. In fp32 they are 16 x 16.
BACKWARD_BLOCK = 128


def tiles_of_a_block(dtype: torch.dtype, slots: int) -> int:
    """Tiles along a side of a mask's block where a backward follows. A block is computed if it has one kept tile."""
    return 1 if dtype is torch.float32 else -(-BACKWARD_BLOCK // slots)


def kernel_options(dtype: torch.dtype, slots: int) -> dict[str, int]:
    """FlexAttention's, for tiles of so many slots. In fp32 shared memory has no room to load a tile ahead."""
    options = dict.fromkeys(BLOCK_OPTIONS, slots)
    return options | {"num_stages": 1} if dtype is torch.float32 else options


@cache
def _compiled_flex(on_cuda: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # What a CPU's compiler makes of dynamic shapes and this mask does not compile: there each shape is compiled anew.
    return torch.compile(flex_attention, dynamic=None if on_cuda else False)


def kept_block_mask(chosen_BNnK: Tensor, queries: Tiling, keys: Tiling, block_tiles: int = 1) -> Any:
    """FlexAttention's BlockMask: blocks of whole kept key tiles are computed unmasked, ragged or half kept ones masked.

    block_tiles: tiles along each side of a block, of queries and of keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    maps = tile_maps(keys, chosen_BNnK.device)
    batch, heads, tiles, _ = chosen_BNnK.shape
    dense = torch.zeros(batch, heads, tiles, keys.tiles, dtype=torch.bool, device=chosen_BNnK.device)
    dense.scatter_(3, chosen_BNnK.long(), True)
    seen_tiles = _blocks(dense, block_tiles)
    whole = _blocks(dense & (maps.counts == keys.slots), block_tiles).all(-1)

    query_tile, key_tile = (
        torch.arange(t.tiles, device=dense.device).repeat_interleave(t.slots) for t in (queries, keys)
    )
    valid = maps.valid.flatten()

    def seen(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return dense[b, h, query_tile[q_index], key_tile[k_index]] & valid[k_index]

    return BlockMask.from_kv_blocks(
        *_ordered(seen_tiles.any(-1) & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=(block_tiles * queries.slots, block_tiles * keys.slots),
        mask_mod=seen,
        seq_lengths=(queries.tiles * queries.slots, keys.tiles * keys.slots),
    )


def _blocks(dense_BNnm: Tensor, size: int) -> Tensor:
    """Each block's size * size tiles [B, N, n / size, m / size, size * size], at the far edges filled up with False."""
    rows, columns = (-side % size for side in dense_BNnm.shape[2:])
    padded = functional.pad(dense_BNnm, (0, columns, 0, rows))
    return padded.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4).flatten(4)


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are set, and the columns, those set first in ascending order; both int32."""
    order = dense.byte().argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), order.int()
