"""Wan's VAE in streams: Diffusers' bits, in any split into blocks; tiles; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.codec import VAEConfig
from model.wan import vae as vae_module
from model.wan.vae import WanVAE, load_vae
from scripts.tiny_models import VAES, small_vae

kinds = pytest.mark.parametrize("kind", list(VAES))


def latents(vae: WanVAE, frames: int = 4, height: int = 4, width: int = 4, batch: int = 1) -> Tensor:
    return torch.randn(batch, frames, vae.channels, height, width, generator=torch.Generator().manual_seed(0))


def video(vae: WanVAE, frames: int = 9) -> Tensor:
    size = vae.spatial
    return torch.rand(1, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def reference_decode(model, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """As WanPipeline decodes: un-normalised with the reciprocal, then its video processor's [0, 1]."""
    mean = torch.tensor(model.config.latents_mean).view(1, -1, 1, 1, 1)
    reciprocal = 1.0 / torch.tensor(model.config.latents_std).view(1, -1, 1, 1, 1)
    out = model.decode(x.transpose(1, 2) / reciprocal + mean).sample
    return (out / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@kinds
def test_streamed_decode_is_diffusers_whole_clip_bit_for_bit(kind: str) -> None:
    vae = WanVAE(small_vae(kind))
    x = latents(vae, frames=3)
    expected = reference_decode(vae.model, x)
    assert expected.shape == (1, 9, 3, 4 * vae.spatial, 4 * vae.spatial)
    assert expected.std() > 0.01
    for split in ([3], [1, 2]):
        stream = vae.decoding()
        blocks = [stream(block) for block in x.split(split, dim=1)]
        assert [block.shape[1] for block in blocks] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
        assert torch.equal(torch.cat(blocks, dim=1), expected), split
    # it would mean nothing if frames were decoded one by one
    assert not torch.allclose(vae.decode(x[:, 2:])[:, -1], expected[:, -1], atol=1e-3)


@kinds
def test_encode_is_diffusers_bit_for_bit_and_streams(kind: str) -> None:
    vae = WanVAE(small_vae(kind))
    pixels, config = video(vae), vae.model.config
    z = vae.model.encode(pixels.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    reciprocal = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    expected = ((z - mean) * reciprocal).transpose(1, 2)
    assert expected.shape == (1, *vae.latent_shape(*pixels.shape[1:2], *pixels.shape[3:]))
    assert torch.equal(vae.encode(pixels), expected)
    for split in ([1, 8], [5, 4]):
        stream = vae.encoding()
        blocks = [stream(block) for block in pixels.split(split, dim=1)]
        # its last convolution sees the whole clip at once in Diffusers, where a library may order its sums otherwise
        assert torch.allclose(torch.cat(blocks, dim=1), expected, atol=1e-5), split


@kinds
def test_tiles_are_diffusers_and_stream_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_module, "TILE", 32)
    monkeypatch.setattr(vae_module, "TILE_STRIDE", 16)
    model = small_vae(kind)
    vae, whole = WanVAE(model, tiled=True), WanVAE(model)
    x = latents(vae, frames=2, height=48 // vae.spatial, width=(32 if kind == "2.1" else 16) // vae.spatial)
    model.enable_tiling(32, 32, 16, 16)
    try:
        expected = reference_decode(model, x)
    finally:
        model.disable_tiling()
    assert not torch.allclose(expected, whole.decode(x), atol=1e-4)  # tiles are visible in a net of random weights
    stream = vae.decoding()
    assert torch.allclose(torch.cat([stream(block) for block in x.split([1, 1], dim=1)], dim=1), expected, atol=1e-6)
    small = latents(vae, frames=1, height=2, width=1)
    assert torch.equal(vae.decode(small), whole.decode(small))  # one tile is enough


@kinds
def test_a_saved_vae_loads_alone_from_a_pipeline_and_in_bf16(kind: str, tmp_path: Path) -> None:
    model = small_vae(kind)
    model.save_pretrained(tmp_path / "pipeline/vae")
    x = latents(WanVAE(model), frames=2, height=2, width=2)
    expected = WanVAE(model).decode(x)
    for path in (tmp_path / "pipeline", tmp_path / "pipeline/vae"):
        assert torch.equal(load_vae(VAEConfig(str(path), dtype="fp32")).decode(x), expected)
    half = load_vae(VAEConfig(str(tmp_path / "pipeline")))
    assert half.dtype == torch.bfloat16
    out = half.decode(x)
    assert out.dtype == torch.float32
    assert torch.allclose(out, expected, atol=0.05)
    assert not torch.equal(out, expected)
    assert half.encode(video(half, 5)).dtype == torch.float32


def test_geometry_of_the_published_vaes() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        big = AutoencoderKLWan()
    vae = WanVAE(big)
    assert vae.latent_shape(81, 480, 832) == (21, 16, 60, 104)
    assert WanVAE(small_vae("2.2")).latent_shape(121, 704, 1280) == (31, 48, 44, 80)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    vae = WanVAE(small_vae("2.1"))
    with pytest.raises(ValueError, match="80 frames: give 4 n \\+ 1 of them, such as 77 or 81"):
        vae.latent_shape(80, 16, 16)
    with pytest.raises(ValueError, match="frames of 20 x 16 pixels: give multiples of 8"):
        vae.encode(torch.zeros(1, 1, 3, 20, 16))
    with pytest.raises(ValueError, match="pixels must be"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16))
    stream = vae.decoding()
    stream(latents(vae, frames=1, height=1, width=2))
    with pytest.raises(ValueError, match=r"do not fit \[B, F, C, H, W\] with \[1, 16, 1, 2\]"):
        stream(latents(vae, height=3))
    with pytest.raises(ValueError, match="do not fit"):
        vae.decode(latents(vae).transpose(1, 2))
    with pytest.raises(ValueError, match="dtype 'int8' is unknown: choose bf16 or fp32"):
        VAEConfig(dtype="int8")
    with pytest.raises(ValueError, match="path is null"):
        load_vae(VAEConfig())


def test_a_folder_that_is_no_vae_is_refused(tmp_path: Path) -> None:
    def refused(match: str, path: Path = tmp_path) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_vae(VAEConfig(str(path), dtype="fp32"))
        assert "\n" not in str(caught.value)

    refused("is no folder", tmp_path / "absent")
    refused("has no vae/config.json")
    small_vae("2.1").save_pretrained(tmp_path / "vae")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"base_dim": 8}))
    refused("does not load|mismatched weights")
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"scale_factor_spatial": 16}))
    refused("scale_factor_spatial 16, its layers make it 8")
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    refused("holds AutoencoderKL: give the folder of AutoencoderKLWan")
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "decoder.conv_in.bias"}, weights)
    refused("missing weights .decoder.conv_in.bias")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("does not load")
