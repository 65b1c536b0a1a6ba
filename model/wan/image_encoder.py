"""What Wan's image-to-video networks see of an image: CLIP's tokens (Wan2.1), and channels beside the latents.

The image encoder is transformers' CLIPVisionModel, its preprocessing Pillow's, as the pipeline's folder says (arXiv
2503.20314, section 5.1).
"""

# B batch  F latent frames  C channels  H W latent size  T pixel frames  h w pixel size  Li tokens  Di their width

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.folders import load_whole, loading, part_folder, pipeline_folder, read_config
from model.wan.vae import STRIDE_T, WanVAE

PARTS = ("image_encoder", "image_processor")
CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection")  # the projection is not used
GREY = 0.5  # of frames that are not given, in [0, 1]


class ImageEncoder:
    """A frozen CLIP. model: transformers' CLIPVisionModel. processor: its image processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.width: int = model.config.hidden_size

    def to(self, device: torch.device | str) -> ImageEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens [B, Li, Di], fp32, of images [B, 3, h, w] in [0, 1]: what goes into CLIP's last layer.

        They are resized, cropped and normalised as the processor is set, from 8 bits a channel as files have them.
        Raises ValueError for another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"image encoder: images must be [B, 3, h, w], got {list(pixels.shape)}")
        levels = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        seen = self.processor(images=list(levels), return_tensors="pt", input_data_format="channels_last")
        values = seen["pixel_values"].to(self.model.device, self.model.dtype)
        tokens: Tensor = self.model(pixel_values=values, output_hidden_states=True).hidden_states[-2]
        return tokens.float()


def check_image_encoder(path: str | Path) -> Path:
    """The folder of the image encoder of a pipeline. Raises ValueError, one line, where there is none."""
    folder = part_folder(pipeline_folder(path, PARTS), "image_encoder")
    read_config(folder, *CLASSES)
    return folder


def load_image_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ImageEncoder:
    """The image encoder of a pipeline's folder or Hub name: its parts `image_encoder` and `image_processor`.

    Raises ValueError, one line, for what is no whole CLIPVisionModel.
    """
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    folder = check_image_encoder(path)
    beside = folder.parent / "image_processor"
    settings = beside if beside.is_dir() else folder
    if not (settings / "preprocessor_config.json").is_file():
        raise ValueError(f"image encoder: {settings} has no preprocessor_config.json: fetch image_processor too")
    with loading("image encoder", settings):
        processor = CLIPImageProcessorPil.from_pretrained(settings, local_files_only=True)
    model = load_whole(CLIPVisionModel, folder, "image encoder", unused="visual_projection.", dtype=dtype)
    return ImageEncoder(model, processor).to(device)


@torch.no_grad()
def image_channels(vae: WanVAE, image: Tensor, frames: int) -> Tensor:
    """Channels [B, F, 4 + C, H, W], fp32, that an image-to-video network sees beside `frames` latent frames.

    image: the first pixel frame [B, 3, h, w] in [0, 1], or the first ones [B, T, 3, h, w]. Channels are the mask (for
    each of a latent frame's four pixel frames whether it is given; the first latent frame stands for one, four times),
    then latents of the given frames and grey ones after them (Diffusers' WanImageToVideoPipeline.prepare_latents).
    Equal images need one encoding: expand what comes back. Raises ValueError for more frames than the video has.
    """
    pixels = image[:, None] if image.ndim == 4 else image
    total, known = STRIDE_T * (frames - 1) + 1, pixels.shape[1]
    if pixels.ndim != 5 or not 1 <= known <= total:
        raise ValueError(
            f"image {list(image.shape)} must be [B, 3, h, w], or 1 to {total} frames [B, T, 3, h, w] for {frames} "
            "latent frames"
        )
    grey = pixels.new_full((1, 1, 1, 1, 1), GREY).expand(pixels.shape[0], total - known, *pixels.shape[2:])
    latents = vae.encode(torch.cat([pixels, grey], 1))
    mask = (torch.arange(total) < known).float()
    mask = torch.cat([mask[:1].expand(STRIDE_T - 1), mask]).view(1, frames, STRIDE_T, 1, 1).to(latents.device)
    return torch.cat([mask.expand(latents.shape[0], -1, -1, *latents.shape[3:]), latents], 2)
