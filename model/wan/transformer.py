"""The Wan DiT (arXiv 2503.20314), one class for bidirectional, block-causal, teacher-forcing and KV-cached use.

B batch  F latent frames  C channels  H W latent size  S tokens of a frame  L = F * S tokens  M text tokens
d model width.  Parameter names are Wan's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing, recomputed
from model.attention.kv_cache import CacheShape, CacheSpec, KVCache
from model.attention.masks import FrameMask
from model.attention.passes import Grid, PassContext, PassMode
from model.attention.replay import Trace, TracedPass
from model.attention.rope import rope_table
from model.attention.sparse import SparseConfig, Sparsity
from model.family import Network
from model.wan.block import KV, Block, Head, ImageEmbedding, fp32_linear
from model.wan.config import TIME_SCALE, WanConfig
from utils.parallel.sequence import FrameShards


def layer_weights(net: WanTransformer) -> Iterator[tuple[str, Tensor]]:
    """Wan's initialisation, (name, value) one at a time: Xavier for linear layers, N(0, 0.02) for text and time
    embeddings, a zero head. Some come twice, the second counts: so the order of draws is one and the same for all."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if not name.endswith(".to_gate_compress")]
    for gate in (name for name in linear if name.endswith(".to_gate_compress")):
        yield f"{gate}.weight", torch.zeros(shapes[f"{gate}.weight"])
        yield f"{gate}.bias", torch.zeros(shapes[f"{gate}.bias"])
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


class WanTransformer(Network):
    """Velocity network. Causal or bidirectional is a mask or a cache, never another class.

    backend: attention backend. checkpointing: what is kept of each block for backward. sparse: its self-attention's.
    sequence: the ranks that share the tokens, set from outside (`apply_sequence_parallel`); None where there are none.
    """

    def __init__(
        self,
        config: WanConfig,
        backend: Backend = Backend.SDPA,
        checkpointing: Checkpointing = Checkpointing.none,
        sparse: SparseConfig | None = None,
    ) -> None:
        super().__init__()
        self.sparse = None if sparse is None else Sparsity(sparse)
        self.config, self.backend, self.checkpointing = config, backend, checkpointing
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, config.dim * 6))
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, layer, self.sparse) for layer in range(config.num_layers))
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

    def low_bit_layers(self) -> list[nn.Module]:
        """The blocks' linear layers; the gates of sparse attention stay as they are."""
        gates = {module for name, module in self.named_modules() if name.endswith(".to_gate_compress")}
        return [layer for layer in super().low_bit_layers() if layer not in gates]

    def new_cache(
        self, spec: CacheSpec, *, dtype: torch.dtype, device: torch.device | str, memory: Tensor | None = None
    ) -> KVCache:
        """An empty cache; under sequence parallelism with all tokens of this rank's heads. memory: see `KVCache`."""
        c = self.config
        shape = CacheShape(
            layers=c.num_layers,
            batch=spec.batch,
            context_frames=spec.context_frames,
            tokens_per_frame=c.tokens_per_frame(spec.height, spec.width),
            heads=c.num_heads if self.sequence is None else c.num_heads // self.sequence.size,
            head_dim=c.head_dim,
            block_frames=spec.block_frames,
        )
        return KVCache(
            shape,
            sinks=spec.sinks,
            rolling=spec.rolling,
            in_order=self.sparse is not None,
            reach=spec.reach,
            dtype=dtype,
            device=device,
            memory=memory,
        )

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        channels: Tensor | None = None,
        image: Tensor | None = None,
        **options: Any,
    ) -> Tensor | list[Tensor]:
        """Velocity [B, F, C, H, W] at x; with `features` a list of tokens [B, F, d, H / ph, W / pw] in its place.

        x: latents [B, F, C, H, W].
        sigma: noise level in [0, 1], [B] or one a frame [B, F].
        text: [B, M, D], zeros after its length.
        channels: [B, F, Cc, H, W] that the network sees beside x, for each frame: masks and latents of given frames.
        image: CLIP's tokens [B, Li, Di], for a network with an `image_dim`.
        options: the fields of `PassMode`.
        Raises ValueError for latents, conditioning or a mask of another geometry, and for blocks that there are not.
        """
        mode = PassMode(**options)
        self._check(x, sigma, text, channels, image)
        self._check_features(mode)
        self._check_mask(x.shape[1], mode.mask, mode.cache)
        _, ph, pw = self.config.patch_size
        grid = frames, height, width = x.shape[1], x.shape[3] // ph, x.shape[4] // pw
        shards = None if self.sequence is None else self.sequence.frames(height * width)
        seen = x if channels is None else torch.cat([x, channels.to(x.dtype)], 2)
        tokens = self._patchify(seen, shards)
        time, time6 = self._time(sigma)
        rope = self._rope(mode, grid, shards, x.device)
        shared = PassContext(rope, grid, self.backend, mode.mask, shards, mode.adapter)
        if mode.replay is not None:
            tokens = self._replay(tokens, time6, self._context(text, image), mode.replay, shared)
        else:
            noted = None if mode.trace is None else mode.trace.start(x, sigma, rope, frames * height * width)
            tokens, *tapped = self._run_blocks(tokens, time6, (text, image), mode, shared, noted)
            if mode.features is not None:
                return [self._in_place(x if shards is None else shards.gather(x), grid) for x in tapped]
        out = self.head(tokens, time)
        return self._unpatchify(out if shards is None else shards.gather(out), grid)

    def _rope(self, mode: PassMode, grid: Grid, shards: FrameShards | None, device: torch.device) -> Tensor:
        """The rotation of this rank's tokens: [2, L, D / 2]."""
        if mode.replay is not None:
            return mode.replay.rope
        rope = mode.rope
        if rope is None:
            start = 0 if mode.cache is None else mode.cache.position
            positions = range(start, start + grid[0]) if mode.positions is None else mode.positions
            rope = rope_table(positions, *grid[1:], self.config.head_dim, device)
        return rope if shards is None else shards.shard(rope)

    def _run_blocks(
        self,
        x: Tensor,
        time6: Tensor,
        prompt: tuple[Tensor, Tensor | None],
        mode: PassMode,
        shared: PassContext,
        noted: TracedPass | None,
    ) -> list[Tensor]:
        """Tokens after the last block that ran, then those after the blocks of `mode.features`; writes the cache.

        x: tokens [B, L, d] of this rank.
        time6: projected time [B, F, 6, d].
        prompt: text [B, M, D] and image tokens [B, Li, Di], embedded here unless a cache knows their keys and values.
        mode: what the caller asks of the pass.
        shared: what all blocks see alike.
        noted: where the pass is noted for a replay, None for nowhere.
        """
        embedded: Tensor | None = None
        tapped: list[Tensor] = []
        cache, features = mode.cache, mode.features
        is_staged = cache is not None and not torch.is_grad_enabled() and cache.stages(shared.grid[0])
        # what lies behind the context already is not kept a second time
        computed: list[KV] | None = [] if cache is not None and mode.write_cache and not is_staged else None
        for layer, block in enumerate(self.blocks):
            join = None if cache is None else cache.join(layer)
            context_kv = None if cache is None else cache.text(layer)
            if context_kv is None and embedded is None:
                embedded = self._context(*prompt)
            if noted is not None:
                noted.joins.append(None if cache is None else cache.join(layer, again=True))
            run = recomputed(block, self.checkpointing)
            x, kv, context_kv = run(x, time6, embedded, shared, context_kv=context_kv, join=join)
            if cache is not None:
                cache.keep_text(layer, context_kv)
            if computed is not None:
                computed.append(kv)
            if noted is not None:
                noted.outputs.append(x)
            if features is not None and layer in features:
                tapped.append(x)
                if layer == features[-1]:
                    break
        if cache is not None and mode.write_cache:
            cache.write(shared.grid[0], computed)
        return [x, *tapped]

    def _replay(self, x: Tensor, time6: Tensor, embedded: Tensor, trace: Trace, shared: PassContext) -> Tensor:
        """Tokens [B, L, d] after the last block, which are known, with the gradient of the traced passes.

        x: tokens [B, L, d] of all of the passes.
        time6: their projected time [B, F, 6, d].
        embedded: text, behind the image's tokens [B, M, d].
        trace: what the passes saw, and what came out of each block.
        shared: what all blocks see alike.
        """
        for layer, block in enumerate(self.blocks):
            x, _, _ = block(x, time6, embedded, shared, join=trace.joins(layer), known=trace.output(layer))
        return x

    def _context(self, text: Tensor, image: Tensor | None) -> Tensor:
        """Embedded text [B, M, d], behind the image's tokens where there are any."""
        embedded: Tensor = self.text_embedding(text)
        return embedded if image is None else torch.cat([self.img_emb(image), embedded], 1)

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

    def _unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        _, ph, pw = self.config.patch_size
        frames, height, width = grid
        patches = x.reshape(x.shape[0], *grid, ph, pw, self.config.out_dim)
        return patches.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape[0], frames, -1, height * ph, width * pw)

    def _in_place(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, L, d] where they lie: [B, F, d, height, width]."""
        return x.unflatten(1, grid).movedim(-1, 2)

    def _check(self, x: Tensor, sigma: Tensor, text: Tensor, channels: Tensor | None, image: Tensor | None) -> None:
        c = self.config
        beside = 0 if channels is None else channels.shape[2]
        if x.ndim != 5 or x.shape[2] + beside != c.in_dim:
            and_given = "" if c.model_type != "i2v" else f", {c.in_dim - c.out_dim} of them image conditioning"
            found = f"{list(x.shape)} and {beside} channels of conditioning" if beside else f"{list(x.shape)}"
            raise ValueError(f"latents must be [B, F, {c.in_dim}{and_given}, H, W], got {found}")
        if channels is not None and (channels.shape[:2], channels.shape[3:]) != (x.shape[:2], x.shape[3:]):
            raise ValueError(f"channels {list(channels.shape)} must be as the latents {list(x.shape)} in all but dim 2")
        c.tokens_per_frame(x.shape[3], x.shape[4])
        if sigma.shape not in (x.shape[:1], x.shape[:2]):
            raise ValueError(f"sigma must be [{x.shape[0]}] or {list(x.shape[:2])}, got {list(sigma.shape)}")
        if text.shape != (x.shape[0], c.text_len, c.text_dim):
            raise ValueError(f"text must be {[x.shape[0], c.text_len, c.text_dim]}, got {list(text.shape)}")
        if (image is None) != (c.image_dim is None):
            raise ValueError(
                "this network has no image_dim and takes no image tokens"
                if c.image_dim is None
                else f"this network needs CLIP's tokens of an image [{x.shape[0]}, Li, {c.image_dim}], got none"
            )
        if image is not None and (image.ndim, image.shape[0], image.shape[-1]) != (3, x.shape[0], c.image_dim):
            raise ValueError(f"image must be [{x.shape[0]}, Li, {c.image_dim}], got {list(image.shape)}")

    def _check_features(self, mode: PassMode) -> None:
        features = mode.features
        if features is None:
            return
        rising = all(a < b for a, b in itertools.pairwise(features))
        if not features or not rising or features[0] < 0 or features[-1] >= len(self.blocks):
            raise ValueError(f"features must be blocks of 0..{len(self.blocks) - 1}, rising, got {list(features)}")
        if mode.replay is not None or mode.write_cache:
            raise ValueError("features end a pass early: it can neither write a cache nor be a replay")

    def _check_mask(self, frames: int, mask: FrameMask | None, cache: KVCache | None) -> None:
        """Attention sees tokens only: a mask of other frames would still fit where the counts happen to divide."""
        keys = frames + (0 if cache is None else cache.held_frames)
        if mask is not None and (mask.query_frames, mask.key_frames) != (frames, keys):
            raise ValueError(
                f"mask of {mask.query_frames} x {mask.key_frames} frames does not fit {frames} frames that see {keys}"
            )
