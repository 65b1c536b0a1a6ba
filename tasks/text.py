"""Embeddings of prompts for networks that take text: from a cache, or from the encoder that made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.network import NetworkConfig
from model.text_encoder import TextConfig, TextEncoder, cleaning
from tasks.text_cache import TextCache
from utils import distributed
from utils.config import config_hash
from utils.errors import ConfigError
from utils.logging import console


@cache
def warn_once(message: str) -> None:
    if distributed.is_main():
        console.warning("%s", message)


def encoder_hash(config: TextConfig, text_len: int) -> str:
    """The hash by which a cache knows its encoder and the text length. Raises ValueError."""
    return config_hash([*config.identity(), text_len])


def made_with(config: TextConfig, text_len: int) -> dict[str, str | int | None]:
    """What a cache says of its encoder in words: the parts of `encoder_hash` that are known without its files."""
    return {
        "encoder": config.encoder, "dtype": config.dtype, "quantization": config.quantization, "text_len": text_len,
        "cleaning": cleaning(),
    }  # fmt: skip


def text_shape(student: NetworkConfig) -> tuple[int, int]:
    """Tokens of an encoded text, and their width. Raises ConfigError for a network that takes no text."""
    shapes = student.family.prompt_shapes(student.geometry())
    if "text" not in shapes:
        raise ConfigError(
            f"student.preset: {student.preset} takes {', '.join(shapes)} and no text: choose another preset"
        )
    length, width = shapes["text"]
    return length, width


class TextEmbeddings:
    """Embeddings of prompts, from the cache, or from the encoder if the cache lacks a prompt.

    The encoder is loaded when it is first needed. Raises ValueError or UserError for a cache that does not fit the
    networks and the encoder, and if there is neither cache nor encoder.
    """

    def __init__(self, config: TextConfig, student: NetworkConfig, device: torch.device) -> None:
        self.config, self.student, self.device = config, student, device
        self.text_len, self.text_dim = text_shape(student)
        if config.cache is None and config.encoder is None:
            raise ValueError(
                "text: cache and encoder are both null: give the folder of preprocess.py text, or of a UMT5 encoder"
            )
        self.cache = TextCache(Path(config.cache), self.text_len, self.text_dim) if config.cache else None
        if self.cache and config.encoder:
            self._check_encoder(self.cache, config)

    def _check_encoder(self, cache: TextCache, config: TextConfig) -> None:
        """Raises ValueError if the encoder would give other embeddings than the cache holds.

        An encoder on the Hub is not fetched for this check. It is compared with the cache's description of its
        encoder, and a description that says too little causes a warning.
        """
        description, refused = made_with(config, self.text_len), False
        if Path(str(config.encoder)).is_dir():
            refused = cache.encoder != encoder_hash(config, self.text_len)
        elif cache.made_with:
            refused = any(cache.made_with.get(key) != value for key, value in description.items() if key != "encoder")
        if refused:
            raise ValueError(
                f"text: {config.cache} was made by another encoder, precision or cleaning than {config.encoder} in "
                f"{config.dtype}: make it anew, or set text.encoder to null"
            )
        if not Path(str(config.encoder)).is_dir() and cache.made_with.get("encoder") != config.encoder:
            made_by = cache.made_with.get("encoder") or "an encoder that it does not name"
            warn_once(
                f"data.text: {config.cache} was made by {made_by}: whether {config.encoder} gives the same embeddings "
                "cannot be known before it is fetched"
            )

    @cached_property
    def encoder(self) -> TextEncoder:
        encoder = self.student.family.text_encoder(self.config, self.student.geometry())
        if encoder.text_dim != self.text_dim:
            raise ValueError(
                f"text: {self.config.encoder} gives embeddings of width {encoder.text_dim}, the networks take "
                f"{self.text_dim}: give the encoder that they were trained with"
            )
        return encoder.to(self.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, D] in fp32, zero after each prompt's tokens. Raises ValueError for a prompt without an embedding."""
        if self.cache and (not self.config.encoder or not self.cache.missing(prompts)):
            return self.cache.encode(prompts).to(self.device)
        return self.encoder.encode(prompts)

    @property
    def from_cache_alone(self) -> bool:
        """Whether there is no encoder for a prompt that the cache lacks."""
        return self.cache is not None and not self.config.encoder

    def check(self, prompts: Iterable[str]) -> None:
        """Raises ValueError naming a prompt that training would not find."""
        if self.cache and self.from_cache_alone and (missing := self.cache.missing(prompts)):
            self.cache.encode(missing[:1])
