"""The one attention seam: attend(q, k, v, mask, backend).

B batch  L query tokens  M key tokens  N heads  D head dim
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from enum import StrEnum
from functools import cache, lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.masks import FrameMask

PLAIN_QUERIES = 192  # rows of scores at a time: they stay in a core's cache between the two matmuls


class Backend(StrEnum):
    """How attention is computed. All give the same numbers up to rounding; tests hold it."""

    SDPA = "sdpa"  # torch's fused kernels
    PLAIN = "plain"  # softmax(q k^T) v as two matmuls: on a CPU the fused bf16 backward is slower for small shapes
    FLEX = "flex"  # FlexAttention, compiled: skips masked blocks
    FLASH = "flash"  # flash-attn 3 or 2, where installed


def available(backend: Backend) -> str | None:
    """None if the backend can run here, else one line saying what it needs."""
    if backend is Backend.FLASH and _flash() is None:
        return "attention 'flash' needs the flash_attn package: install requirements-gpu.txt or use 'sdpa'"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None, backend: Backend = Backend.SDPA
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that the mask allows.

    q: [B, L, N, D], rotated already.
    k, v: [B, M, N, D], keys rotated already.
    mask: None lets every query see every key, else L and M are whole frames of its table.
    backend: what computes the attention.
    Returns [B, L, N, D] in q's dtype. Raises ValueError if the backend is not installed.
    """
    if mask is None:
        return _dense(q, k, v, backend)
    tokens = q.shape[1] // mask.query_frames
    if q.shape[1] != tokens * mask.query_frames or k.shape[1] != tokens * mask.key_frames:
        raise ValueError(
            f"mask of {mask.query_frames} x {mask.key_frames} frames does not fit {q.shape[1]} queries and "
            f"{k.shape[1]} keys"
        )
    if backend is Backend.FLEX:
        return _flex(q, k, v, _flex_mask(mask, tokens, q.device))
    # Query frames that see the same keys are one dense problem: exact, and no masked product is ever computed.
    out = []
    for queries, runs in mask.segments:
        keys = [slice(run.start * tokens, run.stop * tokens) for run in runs]
        k_part, v_part = (torch.cat([t[:, s] for s in keys], 1) if len(keys) > 1 else t[:, keys[0]] for t in (k, v))
        out.append(_dense(q[:, queries.start * tokens : queries.stop * tokens], k_part, v_part, backend))
    return torch.cat(out, dim=1)


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    match backend:
        case Backend.SDPA:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return out.transpose(1, 2)
        case Backend.PLAIN:
            return _plain(q, k, v)
        case Backend.FLEX:
            return _flex(q, k, v, None)
        case Backend.FLASH:
            flash = _flash()
            if flash is None:
                raise ValueError(available(backend))
            return flash(q, k, v)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    out = []
    for part in q.transpose(1, 2).split(PLAIN_QUERIES, 2):
        # scaled after the product and normalised in fp32: a scaled bf16 operand would be rounded twice
        weights = (torch.matmul(part, keys).float() * scale).softmax(-1)
        out.append(torch.matmul(weights.type_as(v), values))
    return (out[0] if len(out) == 1 else torch.cat(out, 2)).transpose(1, 2)


@cache
def _flash() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    packages = ("flash_attn_interface", "flash_attn")  # version 3 first
    found = next((package for package in packages if importlib.util.find_spec(package) is not None), None)
    if found is None:
        return None
    function = importlib.import_module(found).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    return run


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Blocks of a rollout differ in length: without dynamic shapes each would be compiled anew.
    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    if q.device.type == "cpu" and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention 'flex' has no backward on a CPU: train with 'sdpa' or 'plain' here")
    out = _compiled_flex()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask)
    return cast(Tensor, out).transpose(1, 2)


@lru_cache(maxsize=32)  # keyed by the whole mask and geometry: another shape never reuses a mask
def _flex_mask(mask: FrameMask, tokens_per_frame: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    table = torch.tensor(mask.allowed, device=device)

    def allowed(_b: Tensor, _h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return table[q_index // tokens_per_frame, k_index // tokens_per_frame]

    lengths = (mask.query_frames * tokens_per_frame, mask.key_frames * tokens_per_frame)
    return create_block_mask(allowed, None, None, *lengths, device=str(device))
