"""UMT5 on disk: what loads, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.text_encoder import Quantization, TextConfig, TextEncoder, toy_text_encoder
from model.wan.text_encoder import load_text_encoder
from worlds.toy import ToyWorld, ToyWorldConfig

CAPTIONS = ToyWorld(ToyWorldConfig()).captions


def _encoder() -> TextEncoder:
    return toy_text_encoder(CAPTIONS, text_len=8, text_dim=32, seed=0)


def test_an_encoder_on_disk_loads(tmp_path: Path) -> None:
    toy = _encoder()
    toy.encoder.save_pretrained(tmp_path / "text_encoder")  # type: ignore[operator]
    with pytest.raises(ValueError, match="no folder 'tokenizer'"):
        load_text_encoder(tmp_path, text_len=8)
    toy.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_text_encoder(tmp_path, text_len=8, dtype=torch.float32)
    assert torch.equal(loaded.encode([*CAPTIONS[:3], ""]), toy.encode([*CAPTIONS[:3], ""]))
    half = load_text_encoder(tmp_path, text_len=8).encode(CAPTIONS[:1])
    assert half.dtype == torch.float32
    assert torch.allclose(half, toy.encode(CAPTIONS[:1]), atol=0.1)


def test_encoders_load_from_one_folder_too_and_others_are_refused(tmp_path: Path) -> None:
    toy = _encoder()

    def refused(match: str, path: Path, **options: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_text_encoder(path, 8, dtype=torch.float32, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("is no folder: give one in Diffusers' layout, or a Hub name", tmp_path / "absent")
    toy.encoder.save_pretrained(tmp_path / "one")  # type: ignore[operator]
    toy.tokenizer.save_pretrained(tmp_path / "one")
    encoder = load_text_encoder(tmp_path / "one", 8, dtype=torch.float32)
    assert torch.equal(encoder.encode(CAPTIONS[:2]), toy.encode(CAPTIONS[:2]))
    whole = TextConfig(str(tmp_path / "one")).identity()
    assert whole == TextConfig(str(tmp_path / "one")).identity()
    assert whole != TextConfig(str(tmp_path / "one"), dtype="fp32").identity()
    config, weights = tmp_path / "one/config.json", tmp_path / "one/model.safetensors"
    state, text = load_file(weights), config.read_text()
    save_file({name: value + 1 for name, value in state.items()}, weights, {"format": "pt"})
    assert whole != TextConfig(str(tmp_path / "one")).identity()
    save_file({k: v for k, v in state.items() if "final_layer_norm" not in k}, weights, {"format": "pt"})
    refused("1 missing weights .encoder.final_layer_norm.weight", tmp_path / "one")
    config.write_text(text.replace("UMT5EncoderModel", "T5EncoderModel"))
    refused("holds T5EncoderModel: give the folder of UMT5EncoderModel", tmp_path / "one")
    with pytest.raises(ValueError, match="quantization 'int4' is unknown: choose int8 or fp8"):
        TextConfig(quantization="int4")


def test_quantization_is_torchaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: the real package is optional."""
    toy = _encoder()
    toy.encoder.save_pretrained(tmp_path)  # type: ignore[operator]
    toy.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="quantization int8 needs torchao: install it"):
        load_text_encoder(tmp_path, 8, quantization=Quantization.int8)
    asked = []
    stand_in = SimpleNamespace(
        quantize_=lambda module, config: asked.append((type(module).__name__, config)),
        Float8WeightOnlyConfig=lambda: "fp8",
    )
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=stand_in))
    load_text_encoder(tmp_path, 8, quantization=Quantization.fp8)
    assert asked == [("UMT5EncoderModel", "fp8")]
