"""Wan's text encoder: UMT5 (arXiv 2503.20314)."""

# L text tokens  D text width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from model.folders import load_whole, loading, read_config
from model.text_encoder import PARTS, Quantization, TextConfig, TextEncoder, cleaning, encoder_folders, quantizer
from model.types import Prompt

CLASS = "UMT5EncoderModel"


class UMT5Prompts:
    """A `PromptEncoder`: prompts -> text [B, L, D], zero after each prompt's tokens.

    config: names its folder or Hub name.
    text_len, text_dim: L and D of the networks.
    device: where it computes.
    """

    what = "a UMT5 encoder"
    parts = PARTS

    def __init__(self, config: TextConfig, text_len: int, text_dim: int, device: torch.device) -> None:
        self.config, self.text_len, self.text_dim, self.device = config, text_len, text_dim, device
        self._encoder: TextEncoder | None = None

    def identity(self) -> list[str | int | None]:
        return [*self.config.identity(), self.text_len]

    def made_with(self) -> dict[str, str | int | None]:
        return {
            "encoder": self.config.encoder, "dtype": self.config.dtype, "quantization": self.config.quantization,
            "text_len": self.text_len, "cleaning": cleaning(),
        }  # fmt: skip

    def weight_folders(self) -> list[Path]:
        folder, _ = encoder_folders(self._path)
        width = read_config(folder, CLASS).get("d_model")
        if width != self.text_dim:
            raise ValueError(
                f"text encoder: {self._path} gives width {width}, the networks take {self.text_dim}: give the one that "
                "they were trained with"
            )
        return [folder]

    def load(self) -> None:
        if self._encoder is None:
            self.weight_folders()  # gigabytes that do not fit are not read
            dtype, quantization = self.config.dtype.torch, self.config.quantization
            encoder = load_text_encoder(self._path, self.text_len, dtype=dtype, quantization=quantization)
            self._encoder = encoder.to(self.device)

    def encode(self, prompts: Sequence[str]) -> Prompt:
        self.load()
        assert self._encoder is not None
        return {"text": self._encoder.encode(prompts)}

    @property
    def _path(self) -> str:
        assert self.config.encoder is not None
        return self.config.encoder


def load_text_encoder(
    path: str | Path, text_len: int, *, dtype: torch.dtype = torch.bfloat16, quantization: Quantization | None = None
) -> TextEncoder:
    """A UMT5EncoderModel and its tokenizer: see TextConfig.encoder. quantization: of its matrices.

    Raises ValueError, one line, if a part is missing or no UMT5EncoderModel, or torchao is not installed.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder, words = encoder_folders(path)
    read_config(folder, CLASS)
    quantize = quantizer(quantization) if quantization else None  # before gigabytes are read
    with loading("text encoder", words):
        tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
    encoder = load_whole(UMT5EncoderModel, folder, "text encoder", dtype=dtype)
    if quantize is not None:
        quantize(encoder)
    return TextEncoder(encoder, tokenizer, text_len)
