"""Pixels as their own latents, for families without a codec."""

from __future__ import annotations

import pytest
import torch

from model.codec import PixelCodecs, VAEConfig
from model.edm.family import FAMILY

CPU = torch.device("cpu")


def test_pixels_are_their_latents_up_to_mean_and_scale() -> None:
    codecs = PixelCodecs(mean=(0.5, 0.25, 0.0), scale=(2.0, 4.0, 1.0))
    codec = codecs.load(VAEConfig(), CPU)
    pixels = torch.rand(2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(pixels)
    assert latents.shape == pixels.shape  # no frame and no pixel is joined with another
    torch.testing.assert_close(latents[:, :, 1], (pixels[:, :, 1] - 0.25) * 4)
    torch.testing.assert_close(codec.decode(latents), pixels)
    decode = codec.decoding()
    torch.testing.assert_close(torch.cat([decode(block) for block in latents.split(1, dim=1)], 1), pixels)
    mean, deviation = codecs.statistics("")
    torch.testing.assert_close(
        torch.tensor(mean) + torch.tensor(deviation) * latents[0, 0, :, 0, 0], pixels[0, 0, :, 0, 0]
    )
    assert (codecs.time_stride, codec.spatial, codec.channels, codecs.channels(VAEConfig())) == (1, 1, 3, 3)


def test_what_pixels_do_not_have_is_refused() -> None:
    codecs = FAMILY.codecs
    with pytest.raises(ValueError, match="generate pixels and have no VAE, but x is given: leave it out"):
        codecs.load(VAEConfig(path="x"), CPU)
    with pytest.raises(ValueError, match="see no image encoder's tokens"):
        codecs.load_image_encoder("x", torch.float32, CPU)
    with pytest.raises(ValueError, match="pixels have 1 channels, these networks take 3"):
        codecs.load(VAEConfig(), CPU).encode(torch.zeros(1, 1, 1, 2, 2))
