"""Class-conditional EDM networks behind the seam (model/family.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.codec import PixelCodecs
from model.edm.config import PRESETS, EDMConfig
from model.edm.network import EDMNetwork
from model.family import PlainFamily, Trait, replaced
from model.path import EDM
from model.text_encoder import PromptEncoder, TextConfig
from model.types import Prompt


class EDMFamily(PlainFamily):
    """Networks of images with class labels.

    Of the traits it has one: without attention there is no cache, no tile and no head to share among ranks, its
    matrices are few beside its convolutions (no adapters), and it is too small to be computed twice.
    """

    traits = frozenset({Trait.features})
    presets: Mapping[str, EDMConfig] = PRESETS
    telling = ("blocks.0.norm1.weight", "conv_out.bias")
    head = "conv_out.weight"
    shared = ("in_dim", "out_dim", "labels", "sigma_data")
    codecs = PixelCodecs(mean=(0.5, 0.5, 0.5), scale=(2.0, 2.0, 2.0))  # RGB in [-1, 1], as EDM trains

    def geometry(self, preset: str, overrides: Mapping[str, Any]) -> EDMConfig:
        return replaced(PRESETS[preset], overrides)

    def path(self, geometry: EDMConfig) -> EDM:
        return EDM(geometry.sigma_data)

    def network(
        self, geometry: EDMConfig, backend: Backend, checkpointing: Checkpointing, sparse: SparseConfig | None
    ) -> EDMNetwork:
        if backend is not Backend.SDPA:
            raise ValueError(f"attention {backend.value}: this network has none: leave it out")
        assert checkpointing is Checkpointing.none  # configs/checks.py refuses what is of traits that it does not have
        assert sparse is None
        return EDMNetwork(geometry)

    def prompt_shapes(self, geometry: EDMConfig) -> dict[str, tuple[int, ...]]:
        return {"label": (geometry.labels,)}

    def toy_prompts(
        self, captions: Sequence[str], geometry: EDMConfig, seed: int, device: torch.device
    ) -> Callable[[Sequence[str]], Prompt]:
        """Each distinct caption is a class, in the order of the alphabet; the empty prompt is no label."""
        known = sorted(set(captions))
        if len(known) != geometry.labels:
            raise ValueError(
                f"these are {len(known)} different captions, and the network has {geometry.labels} labels: set "
                f"overrides.labels to {len(known)}"
            )
        rows = dict(zip(known, torch.eye(len(known)), strict=True)) | {"": torch.zeros(len(known))}

        def encode(prompts: Sequence[str]) -> Prompt:
            plain = [" ".join(prompt.lower().split()) for prompt in prompts]
            if unknown := [prompt for prompt, key in zip(prompts, plain, strict=True) if key not in rows]:
                raise ValueError(f"prompt {unknown[0]!r} is no class of this network, which knows: {', '.join(known)}")
            return {"label": torch.stack([rows[key] for key in plain]).to(device)}

        return encode

    def text_encoder(self, config: TextConfig, geometry: EDMConfig, device: torch.device) -> PromptEncoder:
        raise ValueError("text: these networks take labels and no text: choose another preset or data.kind")


FAMILY = EDMFamily()
