"""`python preprocess.py video --videos DIR --vae PATH --bucket TxHxW --out DIR`: videos as latents, made once.

`python preprocess.py images --images DIR ...` does the same with images, the first frames of videos of that bucket.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from model.wan.image_encoder import ImageEncoder, image_channels, load_image_encoder
from model.wan.vae import DTYPES, STRIDE_T, VAEConfig, WanVAE, load_vae
from tasks.video_command import Encoders, video_command
from utils import distributed
from utils.data.tensors import Statistics
from utils.errors import UserError

PATCH = 2  # of every Wan DiT, in latent places a side


def preprocess_video(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return video_command(argv, _options, _encoders)


def preprocess_images(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return video_command(argv, _options, _encoders, images=True)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", required=True, help="an AutoencoderKLWan: its folder, a pipeline's, or a Hub name")
    parser.add_argument(
        "--vae_dtype", "--vae-dtype", default="bf16", choices=tuple(DTYPES), help="it computes in (bf16)"
    )
    parser.add_argument("--i2v", action="store_true", help="store what i2v networks see of the first frame too")
    parser.add_argument(
        "--image_encoder", "--image-encoder", metavar="DIR",
        help="and CLIP's tokens of it (Wan2.1): a pipeline's folder or Hub name; with --i2v",
    )  # fmt: skip


def _encoders(args: argparse.Namespace) -> Encoders:
    device = distributed.device()
    if args.image_encoder is not None and not args.i2v:
        raise UserError("--image_encoder: only i2v networks see its tokens: add --i2v, or leave it out")
    try:
        vae = load_vae(VAEConfig(path=args.vae, dtype=args.vae_dtype), device)
    except ValueError as problem:
        raise UserError(f"--vae: {problem}") from None
    try:
        clip = None
        if args.image_encoder is not None:
            clip = load_image_encoder(args.image_encoder, DTYPES[args.vae_dtype], device)
    except ValueError as problem:
        raise UserError(f"--image_encoder: {problem}") from None
    settings = {"vae": args.vae, "vae_dtype": args.vae_dtype}
    return Encoders(
        video=lambda pixels: vae.encode(pixels.to(device)).cpu(),
        settings=settings | ({"i2v": True, "image_encoder": args.image_encoder} if args.i2v else {}),
        temporal=STRIDE_T,
        spatial=vae.spatial * PATCH,
        statistics=Statistics(tuple(vae.mean.flatten().tolist()), tuple((1 / vae.scale).flatten().tolist())),
        visual=partial(_visual, vae, clip) if args.i2v else None,
    )


@torch.no_grad()
def _visual(vae: WanVAE, clip: ImageEncoder | None, frames: int, first: Tensor) -> dict[str, Tensor]:
    """`first_latents` [B, F, C, H, W] and maybe `clip` [B, Li, Di] of the first frames [B, 3, h, w] of videos."""
    latent_frames = (frames - 1) // STRIDE_T + 1
    found = {"first_latents": image_channels(vae, first.to(vae.device), latent_frames)[:, :, STRIDE_T:]}
    return found if clip is None else found | {"clip": clip.encode(first)}
