"""The parts of the Wan DiT (arXiv 2503.20314): attention and its projections, the block, the head, the image embedding.

B batch  F latent frames  S tokens of a frame  L = F * S tokens  M context tokens (text, behind the image's)
N heads  D head dim  d model width.  Parameter names are Wan's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model.attention.backends import Backend, attend
from model.attention.passes import PassContext
from model.attention.replay import Join, known_output
from model.attention.rope import apply_rope
from model.attention.sparse import Sparsity
from model.lora import use_adapter
from model.wan.config import WanConfig

KV = tuple[Tensor, Tensor]
ContextKV = tuple[Tensor, ...]  # keys and values of the text, then of the image where there is one
Parts = list[tuple[int, Join | None]]  # numbers of tokens, each with the context that they see


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32; Wan applies it across heads, before they are split."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def fp32_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in fp32, whatever its weights are stored in."""
    assert isinstance(layer, nn.Linear)
    bias = None if layer.bias is None else layer.bias.float()
    return functional.linear(x.float(), layer.weight.float(), bias)


def fp32_layer_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """A LayerNorm with weights in fp32, whatever they are stored in; x's dtype comes back."""
    assert isinstance(layer, nn.LayerNorm)
    weight, bias = layer.weight.float(), layer.bias.float()
    return functional.layer_norm(x.float(), weight.shape, weight, bias, layer.eps).type_as(x)


def modulate(x_BLd: Tensor, shift_BFd: Tensor, scale_BFd: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift in fp32; shift and scale are per frame, or one for all frames (F = 1)."""
    normed = functional.layer_norm(x_BLd.float(), x_BLd.shape[-1:], eps=eps)
    per_frame = normed.unflatten(1, (shift_BFd.shape[1], -1))
    return torch.addcmul(shift_BFd[:, :, None], per_frame, 1 + scale_BFd[:, :, None]).flatten(1, 2)


def gated_add(x_BLd: Tensor, y_BLd: Tensor, gate_BFd: Tensor) -> Tensor:
    """x + gate y: multiplied and added in fp32, stored in x's dtype."""
    frames = gate_BFd.shape[1]
    out = torch.addcmul(
        x_BLd.float().unflatten(1, (frames, -1)), y_BLd.float().unflatten(1, (frames, -1)), gate_BFd[:, :, None]
    )
    return out.flatten(1, 2).type_as(x_BLd)


class Attention(nn.Module):
    """Projections of one attention: q, k, v, o and the norms of q and k. Which keys are seen is the caller's.

    gated: whether it has the gate of sparse attention, too."""

    def __init__(self, config: WanConfig, *, gated: bool = False) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()
        if gated:
            self.to_gate_compress = nn.Linear(config.dim, config.dim)

    def query(self, x_BLd: Tensor) -> Tensor:
        return self.norm_q(self.q(x_BLd)).unflatten(-1, (self.heads, -1))

    def gate(self, x_BLd: Tensor) -> Tensor:
        """Of the coarse branch of sparse attention [B, L, N, D]; neither normalised nor rotated."""
        return self.to_gate_compress(x_BLd).unflatten(-1, (self.heads, -1))

    def key_value(self, x_BLd: Tensor) -> KV:
        k, v = self.norm_k(self.k(x_BLd)), self.v(x_BLd)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))


class CrossAttention(Attention):
    """Attention to the text; where the network sees an image's tokens too, each has a softmax of its own, and the two
    are added (Wan2.1's image-to-video network)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.text_len, self.sees_image = config.text_len, config.image_dim is not None
        if self.sees_image:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()

    def context_kv(self, context_BMd: Tensor) -> ContextKV:
        """(k, v) of the text, and of the image's tokens before it, each [B, tokens, N, D]."""
        if not self.sees_image:
            return self.key_value(context_BMd)
        image, text = context_BMd.split([context_BMd.shape[1] - self.text_len, self.text_len], 1)
        k, v = self.norm_k_img(self.k_img(image)), self.v_img(image)
        return *self.key_value(text), k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x_BLd: Tensor, kv: ContextKV, backend: Backend) -> Tensor:
        query = self.query(x_BLd)
        out = attend(query, kv[0], kv[1], backend=backend)
        if self.sees_image:
            out = out + attend(query, kv[2], kv[3], backend=backend)
        return self.o(out.flatten(2))  # type: ignore[no-any-return]


class ImageEmbedding(nn.Module):
    """CLIP's tokens of an image [B, Li, image_dim] -> [B, Li, d]."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.image_dim
        assert width is not None
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        first_norm, first, gelu, second, last_norm = self.proj
        return fp32_layer_norm(last_norm, second(gelu(first(fp32_layer_norm(first_norm, image)))))


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # queries, keys, values, gate


def attend_joined(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, join: Join | Parts | None, run: Attend
) -> Tensor:
    """Attention [B, L, N, D] of tokens to themselves and what precedes them; parts see only themselves and theirs.

    q, k, v: [B, L, N, D], rotated.
    gate: the gate of sparse attention's coarse branch, like q; None without one.
    join: what puts the preceding keys and values before theirs; None where nothing precedes them; or one a part.
    run: attention of all queries to all keys.
    """
    if isinstance(join, list):
        sizes = [size for size, _ in join]
        gates = [None] * len(sizes) if gate is None else gate.split(sizes, 1)
        parts = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), gates, join, strict=True)
        return torch.cat([attend_joined(a, b, c, g, before, run) for a, b, c, g, (_, before) in parts], 1)
    keys, values = (k, v) if join is None else join(k, v)
    return run(q, keys, values, gate)


class Block(nn.Module):
    """Self-attention, cross-attention to text and image, MLP; the first and the last modulated by time (AdaLN).

    sparse: the network's sparse attention, shared by its blocks; each then has a gate for its coarse branch, zero at
    first."""

    def __init__(self, config: WanConfig, layer: int, sparse: Sparsity | None = None) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.eps
        self.adapted: list[nn.Module] = []  # its layers with adapters: see model/lora.py
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.sparse = sparse
        self.self_attn = Attention(config, gated=sparse is not None)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x: Tensor,
        time_BF6d: Tensor,
        context_BMd: Tensor | None,
        shared: PassContext,
        *,
        context_kv: ContextKV | None = None,
        join: Join | Parts | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, KV | None, ContextKV | None]:
        """x [B, L, d] -> x, this pass's rotated (k, v) and the context's, each [B, tokens, N, D].

        x: tokens [B, L, d], of this rank where ranks share them; the rotated (k, v) are then all tokens of its heads.
        time_BF6d: projected time in fp32; F = 1 where all frames share it.
        context_BMd: embedded text, behind the image's tokens where the network sees one; None with context_kv.
        shared: what is the same for all blocks of the pass.
        context_kv: keys and values of context_BMd, where an earlier pass has kept them.
        join: puts the keys and values that precede these tokens, and are seen by all of them, before their own; or a
        list of them for parts of the tokens, which then see nothing of each other.
        known: x after this block, from passes already made (model/attention/replay.py): only backward computes.
        """
        if known is not None:
            return self._replay(known, x, time_BF6d, context_BMd, shared, join), None, None
        if self.adapted:
            use_adapter(self.adapted, shared.adapter)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (time_BF6d + self.modulation.float()).unbind(2)
        h = modulate(x, shift, scale, self.eps).type_as(x)
        attended, kv = self._self_attention(h, shared, join)
        x = gated_add(x, attended, gate)

        if context_kv is None:
            assert context_BMd is not None
            context_kv = self.cross_attn.context_kv(context_BMd)
        normed = x if isinstance(self.norm3, nn.Identity) else fp32_layer_norm(self.norm3, x)
        x = x + self.cross_attn(normed, context_kv, shared.backend).type_as(x)

        h = modulate(x, mlp_shift, mlp_scale, self.eps).type_as(x)
        return gated_add(x, self.ffn(h), mlp_gate), kv, context_kv

    def _self_attention(self, h: Tensor, shared: PassContext, join: Join | Parts | None) -> tuple[Tensor, KV]:
        """What tokens [B, L, d] get from each other and from what precedes them, and their rotated (k, v)."""
        k, v = self.self_attn.key_value(h)
        k, q = apply_rope(k, shared.rope), apply_rope(self.self_attn.query(h), shared.rope)
        coarse = None if self.sparse is None else self.self_attn.gate(h)
        shards = shared.shards
        if shards is not None:
            q, k, v, *gates = shards.to_heads(q, k, v, *([] if coarse is None else [coarse]))
            coarse = gates[0] if gates else None
        out = attend_joined(q, k, v, coarse, join, partial(self._attend, shared))
        if shards is not None:
            out = shards.to_tokens(out)
        return self.self_attn.o(out.flatten(2)), (k, v)

    def _attend(self, shared: PassContext, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        """As of `Attend`, under the mask and by the backend of the pass."""
        if self.sparse is None or gate is None:
            return attend(q, k, v, mask=shared.mask, backend=shared.backend)
        return self.sparse.attend(q, k, v, gate, shared.grid[1:], shared.mask)

    def _replay(
        self,
        known: Tensor,
        x: Tensor,
        time_BF6d: Tensor,
        context_BMd: Tensor | None,
        shared: PassContext,
        join: Join | Parts | None,
    ) -> Tensor:
        """`known`, with the gradient of a forward from the other arguments, which are `forward`'s."""
        assert context_BMd is not None

        def run(x: Tensor, time_BF6d: Tensor, context_BMd: Tensor) -> Tensor:
            # not through __call__: hooks of the replay's own call surround its backward
            return self.forward(x, time_BF6d, context_BMd, shared, join=join)[0]

        weights = [p for p in self.parameters() if p.requires_grad]
        return known_output(run, known, (x, time_BF6d, context_BMd), weights)


class Head(nn.Module):
    """Last modulation and projection to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time_BFd: Tensor) -> Tensor:
        shift, scale = (time_BFd[:, :, None] + self.modulation.float()).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps).type_as(x))
