"""Small random networks and inputs for the tests of model and pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.merged import MergedWeights
from model.types import Conditioning
from model.wan.config import WanConfig
from model.wan.lora_files import LoraFile
from model.wan.transformer import WanTransformer
from model.weights import Weights

MICRO = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=3, out_dim=3, text_dim=12, text_len=5, freq_dim=16
)

NORMS = tuple(
    f"{name}.weight" for name in ("norm_q", "norm_k", "norm_k_img", "norm3", "img_emb.proj.0", "img_emb.proj.4")
)


def random_net(
    seed: int,
    config: WanConfig = MICRO,
    *,
    backend: Backend = Backend.PLAIN,
    checkpointing: Checkpointing = Checkpointing.none,
    sparse: SparseConfig | None = None,
) -> WanTransformer:
    """A network with every parameter random and none zero, so that time, text and positions all matter."""
    generator = torch.Generator().manual_seed(seed)
    net = WanTransformer(config, backend, checkpointing, sparse)
    with torch.no_grad():
        for name, p in net.named_parameters():
            base = 1.0 if name.endswith(NORMS) else 0.0
            scale = 0.3 if p.ndim == 1 or name.endswith("modulation") else p[0].numel() ** -0.5
            p.copy_(base + scale * torch.randn(p.shape, generator=generator))
    return net


def latents(seed: int, batch: int, frames: int, config: WanConfig = MICRO, height: int = 4, width: int = 6) -> Tensor:
    """Standard normal [B, F, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, config.in_dim, height, width, generator=generator)


def texts(seed: int, batch: int, config: WanConfig = MICRO) -> Tensor:
    """Encoded prompts [B, L, D], the last one short."""
    text = torch.randn(batch, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(seed))
    text[-1, 3:] = 0
    return text


def conditioning(seed: int, batch: int, initial: Tensor | None = None) -> Conditioning:
    return Conditioning(texts(seed, batch), initial)


class KeyedNoise:
    """A NoiseSource: each role has its own numbers, the same at every call."""

    def __init__(self, seed: int, batch: int) -> None:
        self.seed, self.batch = seed, batch
        self.roles: list[str] = []

    def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
        self.roles.append(role)
        key = sum((i + 1) * ord(c) for i, c in enumerate(role))
        generator = torch.Generator().manual_seed(1000003 * self.seed + key)
        return torch.randn(self.batch, *shape, generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the L2 norm."""
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def gradients(net: WanTransformer) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, detached copies."""
    return {name: p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}


def with_loras(base: Weights, loras: Sequence[tuple[str | Path, float]], expert: str | None = None) -> MergedWeights:
    """`base` with LoRA files added, each times its scale. Raises ValueError in one line.

    expert: "high" or "low" where a file has changes for both.
    """
    return MergedWeights(base, [(LoraFile(path, base.shapes, expert), scale) for path, scale in loras])
