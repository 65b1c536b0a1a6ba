"""Inputs of sparse attention, and what it should give, written out as dense masked attention in fp64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from model.attention.vsa.tiles import Shape, kept_tiles

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_of(
    batch: int,
    heads: int,
    width: int,
    grid: Shape,
    key_grid: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random q, k, v and gate that want a gradient. Neighbours are alike, so that tiles differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Shape) -> Tensor:
        f, h, w = shape
        coarse = torch.randn(batch, 1 + f // 2, 1 + h // 2, 1 + w // 2, heads, width, generator=generator)
        for dim in (1, 2, 3):
            coarse = coarse.repeat_interleave(2, dim)
        smooth = coarse[:, :f, :h, :w].flatten(1, 3)
        noise = torch.randn(smooth.shape, generator=generator)
        return (smooth + 0.5 * noise).to(device, dtype).requires_grad_()

    return draw(grid), draw(key_grid), draw(key_grid), draw(grid)


def with_gradients(out: Tensor, inputs: Inputs) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def memberships(grid: Shape, cube: Shape, like: Tensor) -> Tensor:
    """[n, L]: 1 where a token is in a tile, found from its coordinates."""
    tile_of = [
        tuple(p // c for p, c in zip(place, cube, strict=True)) for place in itertools.product(*map(range, grid))
    ]
    order = sorted(set(tile_of))
    table = torch.zeros(len(order), len(tile_of))
    for token, tile in enumerate(tile_of):
        table[order.index(tile), token] = 1
    return table.to(like)


def dense_masked(inputs: Inputs, grid: Shape, key_grid: Shape, cube: Shape, sparsity: float) -> list[Tensor]:
    """[out, dq, dk, dv, dgate] in fp64: what the definition says, by autograd of a dense attention under a token mask."""
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    q, k, v, gate = (t.transpose(1, 2) for t in exact)  # [B, N, L, D]
    queries, keys = memberships(grid, cube, q), memberships(key_grid, cube, q)
    q_mean, k_mean, v_mean = (
        torch.einsum("nl,bhld->bhnd", table / table.sum(1, keepdim=True), t)
        for table, t in ((queries, q), (keys, k), (keys, v))
    )
    scale = q.shape[-1] ** -0.5
    scores = q_mean @ k_mean.transpose(-1, -2) * scale
    coarse = scores.softmax(-1) @ v_mean
    kept = kept_tiles(sparsity, len(keys))
    best = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    tiles = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    seen = (queries.T @ tiles.to(q) @ keys) > 0  # [B, N, L, M]
    fine = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ v
    out = fine + gate * torch.einsum("nl,bhnd->bhld", queries, coarse)
    return with_gradients(out.transpose(1, 2), exact)  # type: ignore[arg-type]
