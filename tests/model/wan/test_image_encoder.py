"""What image-to-video networks see of an image: Diffusers' own, on tiny encoders and VAEs that the libraries save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.wan.image_encoder import image_channels, load_image_encoder
from model.wan.vae import WanVAE
from scripts.tiny_models import save_image_encoder, small_image_encoder, small_vae

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def picture(height: int = 24, width: int = 40, seed: int = 0) -> Tensor:
    """Pixels [3, h, w] in [0, 1], of 8 bits as files have them."""
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def as_pil(pixels: Tensor) -> Any:
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().astype(np.uint8))


def pipeline(vae: Any, **parts: Any) -> Any:
    options = {"tokenizer": None, "text_encoder": None, "scheduler": None, "transformer": None}
    return diffusers.WanImageToVideoPipeline(**(options | parts), vae=vae)


@torch.no_grad()
def test_tokens_are_the_pipelines(tmp_path: Path) -> None:
    """Also of several images at once, from a file whose names have the prefix that older transformers wrote."""
    save_image_encoder(tmp_path, 20)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "image_processor")
    pipe = pipeline(small_vae("2.1"), image_encoder=small_image_encoder(20), image_processor=processor)
    images = [picture(), picture(seed=1)]
    expected = torch.cat([pipe.encode_image(as_pil(image), torch.device("cpu")) for image in images])
    encoder = load_image_encoder(tmp_path)
    made = encoder.encode(torch.stack(images))
    assert made.shape == (2, 5, 20) == (2, 5, encoder.width)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(made[0], made[1], atol=1e-3)
    file = tmp_path / "image_encoder/model.safetensors"
    state = {key.removeprefix("vision_model."): value for key, value in load_file(file).items()}
    save_file({f"vision_model.{k}": v for k, v in state.items()}, file, metadata={"format": "pt"})
    assert torch.equal(load_image_encoder(tmp_path).encode(torch.stack(images)), made)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_channels_are_the_pipelines_bit_for_bit(kind: str) -> None:
    vae, pixels, cpu = WanVAE(small_vae(kind)), picture(32, 64), torch.device("cpu")
    pipe, channels, frames = pipeline(vae.model), vae.channels, 3
    height, width = 32 // vae.spatial, 64 // vae.spatial
    _, expected = pipe.prepare_latents(
        pipe.video_processor.preprocess(as_pil(pixels), height=32, width=64), 1, channels, 32, 64, 9, torch.float32,
        cpu, None, torch.zeros(1, channels, frames, height, width),
    )  # fmt: skip
    made = image_channels(vae, pixels[None], frames)
    assert made.shape == (1, frames, 4 + channels, height, width)
    assert torch.equal(made, expected.transpose(1, 2))


@torch.no_grad()
def test_channels_of_several_given_frames() -> None:
    """Whole latent frames of the clip come first; the mask counts pixel frames, the first four times."""
    vae = WanVAE(small_vae("2.1"))
    clip = torch.stack([picture(16, 16, seed) for seed in range(6)])[None]
    made = image_channels(vae, clip, 4)
    assert made[0, :, :4, 0, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(made[:, :2, 4:], vae.encode(clip[:, :5]), rtol=1e-5, atol=1e-6)
    grey = torch.full((1, 7, 3, 16, 16), 0.5)
    assert torch.equal(made[:, :, 4:], vae.encode(torch.cat([clip, grey], 1)))
    assert torch.equal(image_channels(vae, clip[:, :5], 2)[:, :, 4:], vae.encode(clip[:, :5]))
    with pytest.raises(ValueError, match=r"1 to 5 frames \[B, T, 3, h, w\] for 2 latent"):
        image_channels(vae, clip, 2)


def test_what_is_no_image_encoder_is_one_line(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_image_encoder(tmp_path)
        assert "\n" not in str(caught.value)

    refused("has no image_encoder/config.json")
    save_image_encoder(tmp_path, 20)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, h, w\], got \[1, 1, 8, 8\]"):
        load_image_encoder(tmp_path).encode(torch.zeros(1, 1, 8, 8))
    file = tmp_path / "image_encoder/model.safetensors"
    state = load_file(file)
    lost = next(key for key in state if key.endswith("class_embedding"))
    save_file({key: value for key, value in state.items() if key != lost}, file, metadata={"format": "pt"})
    refused("has 1 missing weights .*class_embedding.*: fetch it again")
    (tmp_path / "image_processor/preprocessor_config.json").unlink()
    refused("has no preprocessor_config.json: fetch image_processor too")
    (tmp_path / "image_encoder/config.json").write_text('{"architectures": ["T5"]}')
    refused("holds T5: give the folder of CLIPVisionModel")
