"""`python preprocess.py video --videos DIR --vae PATH --bucket TxHxW --out DIR`: videos as latents, made once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from model.wan.vae import DTYPES, STRIDE_T, VAEConfig, load_vae
from utils import distributed
from utils.config import UserError
from utils.data.tensors import Statistics
from utils.data.video_command import Encoders, video_command

PATCH = 2  # of every Wan DiT, in latent places a side


def preprocess_video(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return video_command(argv, _options, _encoders)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", required=True, help="an AutoencoderKLWan: its folder, a pipeline's, or a Hub name")
    parser.add_argument(
        "--vae_dtype", "--vae-dtype", default="bf16", choices=tuple(DTYPES), help="it computes in (bf16)"
    )


def _encoders(args: argparse.Namespace) -> Encoders:
    device = distributed.device()
    try:
        vae = load_vae(VAEConfig(path=args.vae, dtype=args.vae_dtype), device)
    except ValueError as problem:
        raise UserError(f"--vae: {problem}") from None
    return Encoders(
        video=lambda pixels: vae.encode(pixels.to(device)).cpu(),
        settings={"vae": args.vae, "vae_dtype": args.vae_dtype},
        temporal=STRIDE_T,
        spatial=vae.spatial * PATCH,
        statistics=Statistics(tuple(vae.mean.flatten().tolist()), tuple((1 / vae.scale).flatten().tolist())),
    )
