"""Video sparse attention written out in PyTorch: any device, any tile size, fp32 (fp64 for fp64 input), autograd's
backward. The fast backends are held to it.

B batch  L query tokens  N heads  D head dim  n query tiles  m key tiles  T slots of a tile  K kept key tiles
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.vsa.tiles import Tiling, tile_maps, to_tiles, to_tokens


def tile_means(x_BNnTD: Tensor, tiling: Tiling) -> Tensor:
    """Mean over each tile's valid tokens [B, N, n, D]; padding is zero and not counted."""
    counts = tile_maps(tiling, x_BNnTD.device).counts
    return x_BNnTD.sum(3) / counts[:, None].to(x_BNnTD.dtype)


def coarse_attention(q_BNnD: Tensor, k_BNmD: Tensor, v_BNmD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention between tile means: scores S = q' k'^T / sqrt(D) [B, N, n, m] and O_c = softmax(S) v' [B, N, n, D].

    No bias for the size of a tile (2505.13389, eq. 3). In the dtype of the means: fp32, or fp64 for fp64 input.
    """
    scores = torch.matmul(q_BNnD, k_BNmD.transpose(-1, -2)) * q_BNnD.shape[-1] ** -0.5
    return scores, torch.matmul(scores.softmax(-1), v_BNmD)


def select_tiles(scores_BNnm: Tensor, kept: int) -> Tensor:
    """The `kept` key tiles of highest score of each query tile, int64 [B, N, n, K] ascending; ties by index.

    Not differentiated: scores learn through the coarse output alone.
    """
    order = scores_BNnm.detach().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :kept].sort(dim=-1).values


def fine_attention(q: Tensor, k: Tensor, v: Tensor, chosen_BNnK: Tensor, keys: Tiling) -> Tensor:
    """Softmax attention [B, N, n, T, D] of queries over the valid tokens of their tile's kept key tiles.

    q: [B, N, n, T, D].
    k, v: [B, N, m, T, D].
    chosen_BNnK: indices of the kept key tiles.
    keys: tiling of the keys.
    """
    batch, heads, tiles, _kept = chosen_BNnK.shape
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[:, None, None]
    k_kept, v_kept = (t[b, h, chosen_BNnK].flatten(3, 4) for t in (k, v))  # [B, N, n, K * T, D]
    valid = tile_maps(keys, q.device).valid[chosen_BNnK].view(batch, heads, tiles, 1, -1)
    scores = torch.matmul(q, k_kept.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return torch.matmul(scores.masked_fill(~valid, float("-inf")).softmax(-1), v_kept)


def reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, queries: Tiling, keys: Tiling, kept: int) -> Tensor:
    """O_f + gate * O_c; see video_sparse_attention.

    q, gate: [B, L, N, D].
    k, v: [B, M, N, D].
    queries, keys: tilings of the L and of the M tokens.
    kept: key tiles of each query tile.
    """
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    q_tiles = to_tiles(q.to(exact), queries)
    k_tiles, v_tiles = (to_tiles(t.to(exact), keys) for t in (k, v))
    means = tile_means(q_tiles, queries), tile_means(k_tiles, keys), tile_means(v_tiles, keys)
    scores, coarse = coarse_attention(*means)
    fine = fine_attention(q_tiles, k_tiles, v_tiles, select_tiles(scores, kept), keys)
    return (to_tokens(fine, queries) + gate.to(exact) * spread(coarse, queries)).type_as(q)


def spread(coarse_BNnD: Tensor, tiling: Tiling) -> Tensor:
    """A tile's output [B, N, n, D], given to each of its tokens [B, L, N, D]."""
    tile_of_token = tile_maps(tiling, coarse_BNnD.device).slot_of_token // tiling.slots
    return coarse_BNnD.index_select(2, tile_of_token).transpose(1, 2)
