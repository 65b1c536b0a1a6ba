"""Wan2.1 and Wan2.2 behind the seam (model/family.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.family import Network, Trait
from model.merged import Lora
from model.path import Flow
from model.released import Released, Student
from model.text_encoder import TextConfig, toy_text_encoder
from model.types import Prompt
from model.wan.codecs import WanCodecs
from model.wan.config import PRESETS, WanConfig, geometry
from model.wan.export import WanExporter
from model.wan.init import random_weights
from model.wan.lora_files import LoraFile
from model.wan.released import CLASSES, SOURCES, released
from model.wan.students import STUDENTS, student_of
from model.wan.text_encoder import UMT5Prompts
from model.wan.transformer import WanTransformer
from model.wan.weights import LazyWeights, fit_network, geometry_of
from model.weights import Shapes, Weights


class WanFamily:
    """The Wan DiT of every size, dense or sparse, bidirectional or causal."""

    traits = frozenset(Trait)
    presets: Mapping[str, WanConfig] = PRESETS
    # small, of every geometry, and changed by any training of all weights; and one that most adapters change
    telling = ("blocks.0.norm3.weight", "head.head.bias", "blocks.0.self_attn.q.weight")
    shared = ("in_dim", "out_dim", "text_dim", "text_len", "image_dim")
    lora_targets = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # all of a text-to-video block
    codecs = WanCodecs()
    exporter = WanExporter()
    head = "head.head.weight"
    released_as = CLASSES
    sources = SOURCES
    students: Mapping[str, Student] = STUDENTS

    def geometry(self, preset: str, overrides: Mapping[str, Any]) -> WanConfig:
        return geometry(preset, dict(overrides))

    def path(self, geometry: WanConfig) -> Flow:
        return Flow()

    def network(
        self, geometry: WanConfig, backend: Backend, checkpointing: Checkpointing, sparse: SparseConfig | None
    ) -> WanTransformer:
        return WanTransformer(geometry, backend, checkpointing, sparse)

    def random_weights(self, geometry: WanConfig, sparse: SparseConfig | None) -> Iterator[tuple[str, Tensor]]:
        return random_weights(geometry, sparse)

    def prompt_shapes(self, geometry: WanConfig) -> dict[str, tuple[int, ...]]:
        return {"text": (geometry.text_len, geometry.text_dim)}

    def toy_prompts(
        self, captions: Sequence[str], geometry: WanConfig, seed: int, device: torch.device
    ) -> Callable[[Sequence[str]], Prompt]:
        encoder = toy_text_encoder(captions, geometry.text_len, geometry.text_dim, seed).to(device)
        return lambda prompts: {"text": encoder.encode(prompts).to(device)}

    def text_encoder(self, config: TextConfig, geometry: WanConfig, device: torch.device) -> UMT5Prompts:
        return UMT5Prompts(config, geometry.text_len, geometry.text_dim, device)

    def open_weights(self, path: str, which: str, expert: str | None) -> LazyWeights:
        return LazyWeights(path, which, expert)

    def geometry_of(self, path: str, expert: str | None) -> WanConfig:
        return geometry_of(path, expert=expert)

    def check_fit(self, weights: Weights, net: Network) -> None:
        fit_network(weights, net, net.config)

    def open_lora(self, path: str, shapes: Shapes, expert: str | None) -> Lora:
        return LoraFile(path, shapes, expert)

    def released(self, folder: Path) -> Released:
        return released(folder)

    def student_of(self, path: str, layout: str | None) -> Student | None:
        return student_of(path, layout)


FAMILY = WanFamily()
