"""`python preprocess.py video --videos DIR --vae PATH --bucket TxHxW --out DIR`: videos as latents, made once.

`python preprocess.py images --images DIR ...` does the same with images, the first frames of videos of that bucket.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from model.codec import Codec, Codecs, ImageEncoder, VAEConfig
from model.family import Family, families
from tasks.video_command import Encoders, video_command
from utils import distributed
from utils.data.tensors import Statistics
from utils.errors import UserError
from utils.precision import Dtype


def side_tokens(family: Family) -> int:
    """Latent places a side of a token, in the family's presets."""
    return max(geometry.patch_size[1] for geometry in family.presets.values())


def preprocess_video(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return video_command(argv, _options, _encoders)


def preprocess_images(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return video_command(argv, _options, _encoders, images=True)


def _options(parser: argparse.ArgumentParser) -> None:
    names = [name for name, family in families().items() if not family.codecs.identity]
    parser.add_argument("--family", default=names[0], choices=names, help=f"of the networks ({names[0]})")
    parser.add_argument("--vae", required=True, help="the VAE of the networks: its folder, a pipeline's, or a Hub name")
    parser.add_argument(
        "--vae_dtype",
        "--vae-dtype",
        default="bf16",
        choices=[dtype.value for dtype in Dtype],
        help="it computes in (bf16)",
    )
    parser.add_argument("--i2v", action="store_true", help="store what i2v networks see of the first frame too")
    parser.add_argument(
        "--image_encoder", "--image-encoder", metavar="DIR",
        help="and CLIP's tokens of it (Wan2.1): a pipeline's folder or Hub name; with --i2v",
    )  # fmt: skip


def _encoders(args: argparse.Namespace) -> Encoders:
    family, device = families()[args.family], distributed.device()
    codecs = family.codecs
    if args.image_encoder is not None and not args.i2v:
        raise UserError("--image_encoder: only i2v networks see its tokens: add --i2v, or leave it out")
    try:
        vae = codecs.load(VAEConfig(path=args.vae, dtype=args.vae_dtype), device)
    except ValueError as problem:
        raise UserError(f"--vae: {problem}") from None
    try:
        clip = None
        if args.image_encoder is not None:
            clip = codecs.load_image_encoder(args.image_encoder, Dtype(args.vae_dtype).torch, device)
    except ValueError as problem:
        raise UserError(f"--image_encoder: {problem}") from None
    settings = {"vae": args.vae, "vae_dtype": args.vae_dtype}
    return Encoders(
        video=lambda pixels: vae.encode(pixels.to(device)).cpu(),
        settings=settings | ({"i2v": True, "image_encoder": args.image_encoder} if args.i2v else {}),
        temporal=codecs.time_stride,
        spatial=vae.spatial * side_tokens(family),
        statistics=Statistics(tuple(vae.mean.flatten().tolist()), tuple((1 / vae.scale).flatten().tolist())),
        visual=partial(_visual, codecs, vae, clip) if args.i2v else None,
    )


@torch.no_grad()
def _visual(codecs: Codecs, vae: Codec, clip: ImageEncoder | None, frames: int, first: Tensor) -> dict[str, Tensor]:
    """`first_latents` [B, F, C, H, W] and maybe `clip` [B, Li, Di] of the first frames [B, 3, h, w] of videos."""
    latent_frames = (frames - 1) // codecs.time_stride + 1
    found = {"first_latents": codecs.latents_of(codecs.image_channels(vae, first.to(vae.device), latent_frames))}
    return found if clip is None else found | {"clip": clip.encode(first)}
