"""Video sparse attention (arXiv 2505.13389): a coarse attention between tiles of tokens chooses the few tiles that the
fine attention of each tile reads.

B batch  L query tokens  M key tokens  N heads  D head dim
"""

from __future__ import annotations

import importlib.util
from enum import StrEnum

import torch
from torch import Tensor

from model.attention.vsa.counting import kernel_counter
from model.attention.vsa.flex import flex
from model.attention.vsa.reference import reference
from model.attention.vsa.tiles import Grids, Tiling, kept_tiles


class SparseBackend(StrEnum):
    """How sparse attention is computed. All give the same numbers up to rounding; tests hold it."""

    REFERENCE = "reference"  # plain PyTorch, exact, anywhere: its memory grows with the kept keys of every query
    TRITON = "triton"  # kernels of our own, for CUDA
    FLEX = "flex"  # FlexAttention, compiled; no backward on a CPU


def available(backend: SparseBackend) -> str | None:
    """None if the backend can run here, or its kernels are only counted, else one line saying what it needs."""
    if kernel_counter() is not None:
        return None
    if backend is SparseBackend.TRITON and importlib.util.find_spec("triton") is None:
        return "sparse attention 'triton' needs the triton package: a CUDA build of torch brings it, or use 'reference'"
    return None


def refused(backend: SparseBackend | None, device: torch.device, *, backward: bool) -> str | None:
    """None if networks can run with the backend on this device, else one line saying what they need."""
    if kernel_counter() is not None:
        return None
    chosen = _default(device) if backend is None else backend
    if problem := available(chosen):
        return problem
    if device.type == "cpu" and backward and chosen is SparseBackend.FLEX:
        return "sparse attention 'flex' has no backward on a CPU: train with 'reference' here"
    if device.type == "cpu" and chosen is SparseBackend.TRITON:
        from model.attention.vsa.fused import interpreted

        return None if interpreted() else "sparse attention 'triton' runs on CUDA, not on cpu: use 'reference' there"
    return None


def _default(device: torch.device) -> SparseBackend:
    return SparseBackend.TRITON if device.type == "cuda" else SparseBackend.REFERENCE


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled block would make the index maps anew at each call
def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    grids: Grids,
    sparsity: float,
    *,
    backend: SparseBackend | None = None,
) -> Tensor:
    """O_f + gate * O_c (2505.13389, section 2.2): attention of each query over the key tiles that its tile keeps, plus
    the gated attention between tile means.

    q, gate: [B, L, N, D], q after its norm and rotation.
    k, v: [B, M, N, D], k after its norm and rotation.
    grids: where the L and the M tokens lie, and how they are cut into tiles. Any tile of a cached frame can be kept.
    sparsity: share of key tiles left out, in [0, 1]; at 0 this is dense attention plus the gated coarse branch.
    backend: None takes Triton for CUDA tensors and the reference for others.

    The choice of tiles, by score and then by index, is not differentiated. Under sequence parallelism this comes after
    the all-to-all, on whole sequences of local heads.

    Returns [B, L, N, D] in q's dtype. Raises ValueError for shapes that do not fit, a sparsity outside [0, 1], or a
    backend that cannot run. Autocast changes nothing in here.
    """
    queries, keys = grids.tilings()
    _check(q, k, v, gate, queries, keys)
    kept = kept_tiles(sparsity, keys.tiles)
    backend = _default(q.device) if backend is None else backend
    match backend:
        case SparseBackend.REFERENCE:
            run = reference
        case SparseBackend.FLEX:
            run = flex
        case SparseBackend.TRITON:
            problem = available(backend)
            if problem is not None:
                raise ValueError(problem)
            from model.attention.vsa.fused import fused  # not before: it imports Triton

            run = fused
    with torch.autocast(q.device.type, enabled=False):  # scores of tiles are fp32: rounded to bf16 they would tie
        return run(q, k, v, gate, queries, keys, kept)


def _check(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, queries: Tiling, keys: Tiling) -> None:
    if q.ndim != 4 or gate.shape != q.shape or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("qkvg", (q, k, v, gate), strict=True))
        raise ValueError(
            f"sparse attention takes [batch, tokens, heads, width] for queries, keys, values, gate: {shapes}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"sparse attention: queries are {q.shape[3]} wide, keys {k.shape[3]}")
    for name, tensor, tiling in (("queries", q, queries), ("keys", k, keys)):
        if tensor.shape[1] != tiling.tokens:
            raise ValueError(f"sparse attention: {tensor.shape[1]} {name} do not fill a grid of {tiling.grid}")
