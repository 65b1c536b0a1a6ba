"""Encoded prompts of real models: from a cache, or from the encoder that made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from model.network import NetworkConfig
from model.text_encoder import PromptEncoder, TextConfig
from model.types import Prompt
from tasks.text_cache import TextCache, check_shapes
from utils.compared import config_hash
from utils.errors import ConfigError
from utils.logging import warn

warn_once = cache(warn)


def prompt_encoder(config: TextConfig, student: NetworkConfig, device: torch.device) -> PromptEncoder:
    """The encoder that a config names, not loaded yet. Raises ConfigError for networks that have none."""
    try:
        return student.family.text_encoder(config, student.geometry(), device)
    except ValueError as problem:
        raise ConfigError(f"student.preset {student.preset}: {problem}") from None


def encoder_hash(encoder: PromptEncoder) -> str:
    """The hash by which a cache knows its encoder. Raises ValueError or OSError."""
    return config_hash(encoder.identity())


class TextEmbeddings:
    """Encoded prompts, from the cache, or from the encoder if the cache lacks a prompt.

    The encoder is loaded when it is first needed. Raises ValueError or UserError for a cache that does not fit the
    networks and the encoder, if there is neither cache nor encoder, and for networks whose family has no encoder.
    """

    def __init__(self, config: TextConfig, student: NetworkConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.encoder, self.shapes = prompt_encoder(config, student, device), student.prompt_shapes
        if config.cache is None and config.encoder is None:
            raise ValueError(
                "text: cache and encoder are both null: give the folder of preprocess.py text, or of "
                f"{self.encoder.what}"
            )
        self.cache = TextCache(Path(config.cache), self.shapes) if config.cache else None
        self._loaded = self._said = False
        if self.cache and config.encoder:
            self._check_encoder(self.cache)

    def _check_encoder(self, cache: TextCache) -> None:
        """Raises ValueError if the encoder would give other embeddings than the cache holds.

        An encoder on the Hub is not fetched for this check. It is compared with the cache's description of its
        encoder, and a description that says too little causes a warning.
        """
        config, refused = self.config, False
        if Path(str(config.encoder)).is_dir():
            refused = cache.encoder != encoder_hash(self.encoder)
        elif cache.made_with:
            description = self.encoder.made_with()
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

    def load(self) -> None:
        """Loads the encoder, if the config names one. Raises ValueError or OSError, also where it gives other tensors
        than the networks take."""
        if self._loaded or self.config.encoder is None:
            return
        self.encoder.load()
        try:
            check_shapes(self.encoder.encode([]), self.shapes)
        except ValueError as problem:
            raise ValueError(
                f"text: {self.config.encoder}: {problem}: give the encoder that they were trained with"
            ) from None
        self._loaded = True

    def encode(self, prompts: Sequence[str]) -> Prompt:
        """Tensors of the networks' shapes, fp32, zero after each prompt's tokens.

        Raises ValueError for a prompt without an embedding.
        """
        if self.cache and (not self.config.encoder or not self.cache.missing(prompts)):
            return {name: value.to(self.device) for name, value in self.cache.encode(prompts).items()}
        self._say_missing(prompts)
        self.load()
        return self.encoder.encode(prompts)

    @property
    def from_cache_alone(self) -> bool:
        """Whether there is no encoder for a prompt that the cache lacks."""
        return self.cache is not None and not self.config.encoder

    def contents(self) -> list[str]:
        """Those of the cache; empty without one."""
        return [] if self.cache is None else self.cache.contents()

    def check(self, prompts: Iterable[str]) -> None:
        """Raises ValueError naming a prompt that training would not find. Where an encoder would make it, it warns."""
        prompts = list(dict.fromkeys(prompts))
        if self.cache and self.from_cache_alone and (missing := self.cache.missing(prompts)):
            self.cache.encode(missing[:1])
        self._say_missing(prompts)

    def _say_missing(self, prompts: Sequence[str]) -> None:
        """Warns, once, that prompts are not in the cache, for their encoder costs memory and time."""
        if self.cache is None or self._said or not (missing := self.cache.missing(prompts)):
            return
        self._said = True
        warn_once(
            f"data.text: {len(missing)} of {len(prompts)} prompts are not in {self.config.cache} (the first: "
            f"{missing[0][:60]!r}): each process loads the text encoder for them. preprocess.py text can store them"
        )
