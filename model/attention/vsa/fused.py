"""Video sparse attention with Triton kernels, forward and backward.

B batch  L query tokens  M key tokens  N heads  D head dim  n query tiles  m key tiles  T slots of a tile
K kept key tiles
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.vsa import kernels
from model.attention.vsa.counting import kernel_counter
from model.attention.vsa.reference import coarse_attention
from model.attention.vsa.tiles import Tiling, tile_maps

WIDTHS = (16, 32, 64, 128)  # of a head
SLOTS = (16, 32, 64, 128)  # of a tile
FORWARD_STAGES, BACKWARD_STAGES = 3, 2  # tiles loaded ahead, in 16 bits
SELECT = 4096  # scores that one program selects from
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, queries: Tiling, keys: Tiling, kept: int) -> Tensor:
    """O_f + gate * O_c; see video_sparse_attention.

    q, gate: [B, L, N, D].
    k, v: [B, M, N, D].
    queries, keys: tilings of the L and of the M tokens.
    kept: key tiles of each query tile.

    Raises ValueError for what the kernels cannot run: a dtype, a width, a tile, or tensors outside CUDA.
    """
    if kernel_counter() is None:
        check(q, k, v, queries)
    with _device_of(q):
        q_tiles, q_mean = _TileAndPool.apply(q, queries)
        k_tiles, k_mean = _TileAndPool.apply(k, keys)
        v_tiles, v_mean = _TileAndPool.apply(v, keys)
        scores, coarse = coarse_attention(q_mean, k_mean, v_mean)
        chosen = select_tiles(scores, kept)
        out: Tensor = _FineAndGate.apply(q_tiles, k_tiles, v_tiles, coarse, gate, chosen, (queries, keys))
    return out


def select_tiles(scores_BNnm: Tensor, kept: int) -> Tensor:
    """The `kept` key tiles of highest fp32 score of each query tile, int32 [B, N, n, K] ascending; ties by index."""
    scores = scores_BNnm.detach().contiguous()
    tiles = scores.shape[-1]
    chosen = torch.empty(*scores.shape[:-1], kept, dtype=torch.int32, device=scores.device)
    total = scores.numel() // tiles
    block = max(1 << (tiles - 1).bit_length(), 16)
    rows = max(SELECT // block, 1)
    launch(
        kernels.select_kernel, (-(-total // rows),), scores=scores, chosen=chosen, rows=total, m=tiles, K=kept,
        ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return chosen


def invert(chosen_BNnK: Tensor, key_tiles: int) -> tuple[Tensor, Tensor]:
    """Who reads each key tile: query tiles int32 [B * N, n * K], grouped by key tile and ascending within a group, and
    where each group starts, int32 [B * N, m + 1]."""
    kept = chosen_BNnK.shape[-1]
    flat = chosen_BNnK.flatten(0, 1).flatten(1)
    groups, order = flat.sort(dim=1, stable=True)
    edges = torch.arange(key_tiles + 1, dtype=flat.dtype, device=flat.device).expand(flat.shape[0], -1).contiguous()
    return (order // kept).int(), torch.searchsorted(groups, edges, out_int32=True)


class _TileAndPool(torch.autograd.Function):
    """Tokens [B, L, N, D] -> tiles [B, N, n, T, D] and their means over valid tokens, fp32 [B, N, n, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
        x = _dense_rows(x)
        batch, length, heads, width = x.shape
        maps = tile_maps(tiling, x.device)
        tiles = x.new_empty(batch, heads, tiling.tiles, tiling.slots, width)
        means = x.new_empty(batch, heads, tiling.tiles, width, dtype=torch.float32)
        launch(
            kernels.tile_kernel, (tiling.tiles, batch * heads), x=x, **_strides("x", x), tokens=maps.token_of_slot,
            counts=maps.counts, tiles=tiles, means=means, heads=heads, D=width, T=tiling.slots,
        )  # fmt: skip
        ctx.tiling, ctx.length = tiling, length
        return tiles, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_tiles: Tensor, d_means: Tensor) -> tuple[Tensor, None]:
        batch, heads, tiles, slots, width = d_tiles.shape
        maps = tile_maps(ctx.tiling, d_tiles.device)
        dx = d_tiles.new_empty(batch, ctx.length, heads, width)
        with _device_of(dx):
            launch(
                kernels.untile_kernel, (tiles, batch * heads), d_tiles=d_tiles.contiguous(),
                d_means=d_means.contiguous(), tokens=maps.token_of_slot, counts=maps.counts, dx=dx, heads=heads,
                length=ctx.length, D=width, T=slots,
            )  # fmt: skip
        return dx, None


class _FineAndGate(torch.autograd.Function):
    """Block-sparse attention of tiles and the gated sum, back in tokens: [B, L, N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        coarse: Tensor,
        gate: Tensor,
        chosen: Tensor,
        tilings: tuple[Tiling, Tiling],
    ) -> Tensor:
        """O_f + gate * O_c [B, L, N, D].

        q, k, v: tiles [B, N, n or m, T, D].
        coarse: O_c of each tile, fp32 [B, N, n, D].
        gate: tokens [B, L, N, D].
        chosen: int32 [B, N, n, K], the key tiles that each query tile keeps.
        tilings: the queries' tiling, then the keys'.
        """
        queries, keys = tilings
        gate, coarse = _dense_rows(gate), coarse.contiguous()
        batch, heads, tiles, slots, width = q.shape
        fine = torch.empty_like(q)
        logsum = q.new_empty(batch, heads, tiles, slots, dtype=torch.float32)
        out = q.new_empty(batch, queries.tokens, heads, width)
        launch(
            kernels.attend_kernel, (tiles, batch * heads), products=2, pairs=chosen.numel(), stages=FORWARD_STAGES,
            q=q, k=k, v=v, chosen=chosen, counts=tile_maps(keys, q.device).counts,
            tokens=tile_maps(queries, q.device).token_of_slot, coarse=coarse, gate=gate, **_strides("g", gate),
            fine=fine, logsum=logsum, out=out, scale=width**-0.5, heads=heads, length=queries.tokens, m=keys.tiles,
            K=chosen.shape[-1], D=width, T=slots,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, coarse, gate, chosen, fine, logsum)
        ctx.queries, ctx.keys = queries, keys
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, coarse, gate, chosen, fine, logsum = ctx.saved_tensors
        with _device_of(q):
            d_fine, delta, d_gate, d_coarse = _gate_backward(_dense_rows(d_out), fine, coarse, gate, ctx.queries)
            dq, dk, dv = _fine_backward(q, k, v, chosen, d_fine, logsum, delta, ctx.keys)
        return dq, dk, dv, d_coarse, d_gate, None, None


def _gate_backward(
    d_out: Tensor, fine: Tensor, coarse: Tensor, gate: Tensor, queries: Tiling
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tiles, slots, width = fine.shape
    d_fine = torch.empty_like(fine)
    delta = fine.new_empty(batch, heads, tiles, slots, dtype=torch.float32)
    d_gate = gate.new_empty(gate.shape)
    d_coarse = torch.empty_like(coarse)
    launch(
        kernels.gate_backward_kernel, (tiles, batch * heads), d_out=d_out, **_strides("o", d_out), fine=fine,
        coarse=coarse, gate=gate, **_strides("g", gate), tokens=tile_maps(queries, fine.device).token_of_slot,
        d_fine=d_fine, delta=delta, d_gate=d_gate, d_coarse=d_coarse, heads=heads, length=queries.tokens, D=width,
        T=slots,
    )  # fmt: skip
    return d_fine, delta, d_gate, d_coarse


def _fine_backward(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, d_fine: Tensor, logsum: Tensor, delta: Tensor, keys: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tiles, slots, width = q.shape
    counts, kept = tile_maps(keys, q.device).counts, chosen.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launch(
        kernels.d_query_kernel, (tiles, batch * heads), products=3, pairs=chosen.numel(), stages=BACKWARD_STAGES,
        q=q, k=k, v=v, chosen=chosen, counts=counts, d_fine=d_fine, logsum=logsum, delta=delta, dq=dq,
        scale=width**-0.5, m=keys.tiles, K=kept, D=width, T=slots,
    )  # fmt: skip
    readers, offsets = invert(chosen, keys.tiles)
    launch(
        kernels.d_key_value_kernel, (keys.tiles, batch * heads), products=4, pairs=chosen.numel(),
        stages=BACKWARD_STAGES, q=q, k=k, v=v, readers=readers, offsets=offsets, counts=counts, d_fine=d_fine,
        logsum=logsum, delta=delta, dk=dk, dv=dv, scale=width**-0.5, n=tiles, K=kept, D=width, T=slots,
    )  # fmt: skip
    return dq, dk, dv


def launch(
    kernel: Any, programs: tuple[int, ...], *, products: int = 0, pairs: int = 0, stages: int = 1, **arguments: Any
) -> None:
    """Every kernel starts here, or is counted.

    kernel: of model/attention/vsa/kernels.py.
    programs: how many there are of it, along each axis.
    products: matrix products of T x T x D for a pair of tiles. Kernels with products are told q's type.
    pairs: how many pairs of tiles there are.
    stages: tiles loaded ahead, for kernels with products.
    arguments: the kernel's, by name.
    """
    if (counter := kernel_counter()) is not None:
        counter.computed(2 * products * pairs * arguments["T"] ** 2 * arguments["D"] if products else 0)
        return
    if products:
        import triton.language as tl

        q = arguments["q"]
        operand = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[q.dtype]
        arguments |= {"DOT": operand if q.is_cuda else tl.float32} | launch_options(q.dtype, stages)
    kernel[programs](**arguments)


def _strides(name: str, x_BLND: Tensor) -> dict[str, int]:
    """A kernel's arguments for the strides of x, in numbers: of all but its last dimension, which is contiguous."""
    return {f"{name}_{dimension}": stride for dimension, stride in zip("bln", x_BLND.stride(), strict=False)}


def launch_options(dtype: torch.dtype, stages: int) -> dict[str, int]:
    """Warps and pipeline stages. Tiles in fp32 are twice as large: shared memory has no room to load one ahead."""
    return {"num_warps": 8, "num_stages": 1} if dtype is torch.float32 else {"num_warps": 4, "num_stages": stages}


def _dense_rows(x: Tensor) -> Tensor:
    """x, its last dimension contiguous: the kernels take the strides of the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check(q: Tensor, k: Tensor, v: Tensor, queries: Tiling) -> None:
    if not (q.is_cuda or interpreted()):
        raise ValueError(f"sparse attention 'triton' runs on CUDA, not on {q.device.type}: use 'reference' there")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"sparse attention 'triton' takes one of fp32, fp16, bf16 for all, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[3] not in WIDTHS or queries.slots not in SLOTS:
        raise ValueError(
            f"sparse attention 'triton' takes heads of {WIDTHS} and tiles of {SLOTS} tokens, not {q.shape[3]} and "
            f"{queries.slots}: use 'reference' or another cube"
        )
