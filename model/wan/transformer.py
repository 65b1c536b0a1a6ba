"""The Wan DiT (arXiv 2503.20314), one class for bidirectional, block-causal, teacher-forcing and KV-cached use.

B batch  F latent frames  C channels  H W latent size  S tokens of a frame  L = F * S tokens  M text tokens
N heads  D head dim  d model width.  Parameter names are Wan's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model.wan.attention import Backend, attend
from model.wan.checkpointing import recomputed
from model.wan.config import TIME_SCALE, Checkpointing, WanConfig
from model.wan.kv_cache import CacheShape, KVCache
from model.wan.masks import FrameMask
from model.wan.replay import Join, Trace, TracedPass, known_output
from model.wan.rope import apply_rope, rope_table
from utils.parallel.sequence import FrameShards, SequenceParallel

KV = tuple[Tensor, Tensor]
Parts = list[tuple[int, Join | None]]  # numbers of tokens, each with the context that it sees


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
    """Projections of one attention: q, k, v, o and the norms of q and k. Which keys are seen is the caller's."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()

    def query(self, x_BLd: Tensor) -> Tensor:
        return self.norm_q(self.q(x_BLd)).unflatten(-1, (self.heads, -1))

    def key_value(self, x_BLd: Tensor) -> KV:
        k, v = self.norm_k(self.k(x_BLd)), self.v(x_BLd)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))


def attend_joined(
    q: Tensor, k: Tensor, v: Tensor, join: Join | Parts | None, mask: FrameMask | None, backend: Backend
) -> Tensor:
    """Attention of tokens [B, L, N, D] to themselves and what precedes them; parts see only themselves and theirs."""
    if isinstance(join, list):
        sizes = [size for size, _ in join]
        parts = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), join, strict=True)
        return torch.cat([attend_joined(a, b, c, one, mask, backend) for a, b, c, (_, one) in parts], 1)
    keys, values = (k, v) if join is None else join(k, v)
    return attend(q, keys, values, mask=mask, backend=backend)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; the first and the last modulated by time (AdaLN)."""

    def __init__(self, config: WanConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x: Tensor,
        time_BF6d: Tensor,
        text_BMd: Tensor | None,
        text_kv: KV | None,
        rope: Tensor,
        mask: FrameMask | None,
        join: Join | Parts | None,
        backend: Backend,
        shards: FrameShards | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, KV | None, KV | None]:
        """x [B, L, d] -> x, this pass's rotated (k, v) and the text's (k, v), each [B, tokens, N, D].

        join: puts the keys and values that precede these tokens, and are seen by all of them, before their own; or one
        for each part of the tokens, which then see nothing of each other.
        shards: x and rope are this rank's tokens; the rotated (k, v) are all tokens of this rank's heads.
        known: x after this block, from passes already made (model/wan/replay.py): only backward computes.
        """
        if known is not None:
            return self._replay(known, x, time_BF6d, text_BMd, rope, join, backend, shards), None, None
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (time_BF6d + self.modulation.float()).unbind(2)
        h = modulate(x, shift, scale, self.eps).type_as(x)
        k, v = self.self_attn.key_value(h)
        k, q = apply_rope(k, rope), apply_rope(self.self_attn.query(h), rope)
        if shards is not None:
            q, k, v = shards.to_heads(q, k, v)
        out = attend_joined(q, k, v, join, mask, backend)
        if shards is not None:
            out = shards.to_tokens(out)
        x = gated_add(x, self.self_attn.o(out.flatten(2)), gate)

        if text_kv is None:
            assert text_BMd is not None
            text_kv = self.cross_attn.key_value(text_BMd)
        query = self.cross_attn.query(self._norm3(x))
        x = x + self.cross_attn.o(attend(query, *text_kv, backend=backend).flatten(2)).type_as(x)

        h = modulate(x, mlp_shift, mlp_scale, self.eps).type_as(x)
        return gated_add(x, self.ffn(h), mlp_gate), (k, v), text_kv

    def _replay(
        self,
        known: Tensor,
        x: Tensor,
        time_BF6d: Tensor,
        text_BMd: Tensor | None,
        rope: Tensor,
        join: Join | Parts | None,
        backend: Backend,
        shards: FrameShards | None,
    ) -> Tensor:
        assert text_BMd is not None

        def run(x: Tensor, time_BF6d: Tensor, text_BMd: Tensor) -> Tensor:
            # not through __call__: hooks of the replay's own call surround its backward
            return self.forward(x, time_BF6d, text_BMd, None, rope, None, join, backend, shards)[0]

        weights = [p for p in self.parameters() if p.requires_grad]
        return known_output(run, known, (x, time_BF6d, text_BMd), weights)

    def _norm3(self, x: Tensor) -> Tensor:
        if isinstance(self.norm3, nn.Identity):
            return x
        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        return functional.layer_norm(x.float(), weight.shape, weight, bias, self.eps).type_as(x)


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


def layer_weights(net: WanTransformer) -> Iterator[tuple[str, Tensor]]:
    """Wan's initialisation, (name, value) one at a time: Xavier for linear layers, N(0, 0.02) for text and time
    embeddings, a zero head. Some come twice, the second counts: so the order of draws is one and the same for all."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    for name in layers:
        yield f"{name}.weight", nn.init.xavier_uniform_(torch.empty(shapes[f"{name}.weight"]))
        yield f"{name}.bias", torch.zeros(shapes[f"{name}.bias"])
    patches = torch.empty(shapes["patch_embedding.weight"])
    nn.init.xavier_uniform_(patches.flatten(1))
    yield "patch_embedding.weight", patches
    yield "patch_embedding.bias", torch.zeros(shapes["patch_embedding.bias"])
    for name in layers:
        if name.startswith(("text_embedding.", "time_embedding.")):
            yield f"{name}.weight", nn.init.normal_(torch.empty(shapes[f"{name}.weight"]), std=0.02)
    yield "head.head.weight", torch.zeros(shapes["head.head.weight"])


class WanTransformer(nn.Module):
    """Velocity network. Causal or bidirectional is a mask or a cache, never another class.

    backend: attention backend. checkpointing: what is kept of each block for backward.
    sequence: the ranks that share the tokens, set from outside (`apply_sequence_parallel`); None where there are none.
    """

    sequence: SequenceParallel | None = None

    def __init__(
        self,
        config: WanConfig,
        backend: Backend = Backend.SDPA,
        checkpointing: Checkpointing = Checkpointing.none,
    ) -> None:
        super().__init__()
        self.config, self.backend, self.checkpointing = config, backend, checkpointing
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, config.dim * 6))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = Head(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the layers' weights; norms and modulation keep what they were made with. On meta it draws nothing."""
        if self.head.head.weight.is_meta:
            return
        parameters = dict(self.named_parameters())
        for name, value in layer_weights(self):
            parameters[name].copy_(value)

    def fsdp_units(self) -> list[nn.Module]:
        """The modules to shard one by one; what is left is the root's."""
        return list(self.blocks)

    def new_cache(
        self,
        batch: int,
        context_frames: int,
        height: int,
        width: int,
        *,
        block_frames: int = 0,
        sinks: int = 0,
        rolling: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """An empty cache for latents of `height` x `width`, holding `context_frames` frames beside blocks of
        `block_frames`; under sequence parallelism with all tokens of this rank's heads."""
        c = self.config
        tokens = c.tokens_per_frame(height, width)
        heads = c.num_heads if self.sequence is None else c.num_heads // self.sequence.size
        shape = CacheShape(c.num_layers, batch, context_frames, tokens, heads, c.head_dim, block_frames)
        return KVCache(shape, sinks=sinks, rolling=rolling, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        positions: Sequence[int] | None = None,
        mask: FrameMask | None = None,
        cache: KVCache | None = None,
        write_cache: bool = False,
        trace: Trace | None = None,
        replay: Trace | None = None,
    ) -> Tensor:
        """Velocity [B, F, C, H, W] at x [B, F, C, H, W].

        sigma: noise level in [0, 1], [B] or one a frame [B, F]. text: [B, M, D], zeros after its length.
        positions: absolute frame positions for RoPE; default 0.. or, with a cache, what follows the cached frames.
        mask: who sees whom (default: all see all). cache: frames before these; `write_cache` stores these after them.
        trace: a pass without gradient is noted in it; given as `replay`, with its x, all its passes get their gradient.
        Raises ValueError for latents, text or a mask of another geometry.
        """
        self._check(x, sigma, text)
        self._check_mask(x.shape[1], mask, cache)
        frames, height, width = (
            x.shape[1],
            x.shape[3] // self.config.patch_size[1],
            x.shape[4] // self.config.patch_size[2],
        )
        shards = None if self.sequence is None else self.sequence.frames(height * width)
        tokens = self._patchify(x, shards)
        time, time6 = self._time(sigma)
        if replay is not None:
            tokens = self._replay(tokens, time6, text, replay, shards)
        else:
            if positions is None:
                start = 0 if cache is None else cache.frames
                positions = range(start, start + frames)
            rope = rope_table(positions, height, width, self.config.head_dim, x.device)
            rope = rope if shards is None else shards.own(rope)
            noted = None if trace is None else trace.start(x, sigma, rope, frames * height * width)
            tokens = self._run_blocks(tokens, time6, text, rope, mask, cache, write_cache, shards, noted)
        if cache is not None and write_cache:
            cache.advance(frames)
        out = self.head(tokens, time)
        return self._unpatchify(out if shards is None else shards.gather(out), frames, height, width)

    def _run_blocks(
        self,
        x: Tensor,
        time6: Tensor,
        text: Tensor,
        rope: Tensor,
        mask: FrameMask | None,
        cache: KVCache | None,
        write: bool,
        shards: FrameShards | None,
        noted: TracedPass | None,
    ) -> Tensor:
        embedded: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            join = None if cache is None else cache.join(layer)
            text_kv = None if cache is None else cache.text(layer)
            if text_kv is None and embedded is None:
                embedded = self.text_embedding(text)
            if noted is not None:
                noted.joins.append(None if cache is None else cache.join(layer, again=True))
            arguments = (x, time6, embedded, text_kv, rope, mask, join, self.backend, shards)
            x, kv, text_kv = recomputed(block, self.checkpointing)(*arguments)
            if cache is not None:
                cache.keep_text(layer, *text_kv)
                if write:
                    cache.append(layer, *kv)
            if noted is not None:
                noted.outputs.append(x)
        return x

    def _replay(self, x: Tensor, time6: Tensor, text: Tensor, trace: Trace, shards: FrameShards | None) -> Tensor:
        embedded, rope = self.text_embedding(text), trace.rope
        for layer, block in enumerate(self.blocks):
            parts, known = trace.joins(layer), trace.output(layer)
            x, _, _ = block(x, time6, embedded, None, rope, None, parts, self.backend, shards, known)
        return x

    def _time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 time embedding [B, F, d] and its projection [B, F, 6, d]; F = 1 when all frames share a time."""
        with torch.autocast(sigma.device.type, enabled=False):
            sigma = sigma.unsqueeze(1) if sigma.ndim == 1 else sigma
            half = self.config.freq_dim // 2
            frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
            angle = (TIME_SCALE * sigma.double()).unsqueeze(-1) * frequency
            wave = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
            first, _, second = self.time_embedding
            _, projection = self.time_projection
            time = fp32_linear(second, functional.silu(fp32_linear(first, wave)))
            return time, fp32_linear(projection, functional.silu(time)).unflatten(-1, (6, -1))

    def _patchify(self, x: Tensor, shards: FrameShards | None = None) -> Tensor:
        # A convolution whose stride is its kernel is a linear layer on patches, and faster as one.
        _, ph, pw = self.config.patch_size
        b, f, c, h, w = x.shape
        patches = x.reshape(b, f, c, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        if shards is not None:  # before the first weight, so that each weight's gradient is of this rank's tokens only
            patches = shards.split(patches)
        weight = self.patch_embedding.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, frames: int, height: int, width: int) -> Tensor:
        _, ph, pw = self.config.patch_size
        grid = x.reshape(x.shape[0], frames, height, width, ph, pw, self.config.out_dim)
        return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape[0], frames, -1, height * ph, width * pw)

    def _check(self, x: Tensor, sigma: Tensor, text: Tensor) -> None:
        c = self.config
        if x.ndim != 5 or x.shape[2] != c.in_dim:
            raise ValueError(f"latents must be [B, F, {c.in_dim}, H, W], got {list(x.shape)}")
        c.tokens_per_frame(x.shape[3], x.shape[4])
        if sigma.shape not in (x.shape[:1], x.shape[:2]):
            raise ValueError(f"sigma must be [{x.shape[0]}] or {list(x.shape[:2])}, got {list(sigma.shape)}")
        if text.shape != (x.shape[0], c.text_len, c.text_dim):
            raise ValueError(f"text must be {[x.shape[0], c.text_len, c.text_dim]}, got {list(text.shape)}")

    def _check_mask(self, frames: int, mask: FrameMask | None, cache: KVCache | None) -> None:
        """Attention sees tokens only: a mask of other frames would still fit where the counts happen to divide."""
        keys = frames + (0 if cache is None else cache.held_frames)
        if mask is not None and (mask.query_frames, mask.key_frames) != (frames, keys):
            raise ValueError(
                f"mask of {mask.query_frames} x {mask.key_frames} frames does not fit {frames} frames that see {keys}"
            )
