"""The options of `preprocess.py video` and `images`, and what they do; the caller brings VAE and encoders."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.cli import Parser
from utils.data.buckets import Pace, Size, check_sizes
from utils.data.clips import ImageClips, Start, VideoClips, plan_clips, probe_image
from utils.data.media import IMAGES, VIDEOS, find_media
from utils.data.preprocessing import (
    SUFFIXES,
    EncodeText,
    EncodeVideo,
    EncodeVisual,
    Encoding,
    Job,
    Share,
    encode_videos,
)
from utils.data.stream import MAX_CORRUPT
from utils.data.tensors import Statistics
from utils.errors import UserError


@dataclass(frozen=True)
class Encoders:
    """What turns clips into rows.

    video: pixels to latents.
    settings: what decides the numbers (which VAE, which text encoder), for the identity.
    temporal: the step of pixel frames that VAE and DiT can take, as in `check_sizes`.
    spatial: the step of height and width that they can take.
    statistics: mean and deviation of the VAE's raw latents, for `--raw`.
    text: captions to embeddings; None writes captions without embeddings.
    visual: first frames to what image-to-video networks see; None writes nothing for them.
    """

    video: EncodeVideo
    settings: Mapping[str, Any]
    temporal: int
    spatial: int
    statistics: Statistics | None = None
    text: EncodeText | None = None
    visual: EncodeVisual | None = None


def video_command(
    argv: Sequence[str],
    add_options: Callable[[argparse.ArgumentParser], None],
    build: Callable[[argparse.Namespace], Encoders],
    *,
    images: bool = False,
) -> int:
    """The command. Raises UserError.

    argv: the command's arguments.
    add_options: adds to the parser what `build` needs.
    build: makes the encoders of the parsed arguments.
    images: whether it encodes images instead of videos.
    """
    kind = "images" if images else "videos"
    name = "images" if images else "video"
    parser = Parser(prog=f"preprocess.py {name}", description=f"Latents of {kind}, file by file.")
    if images:
        parser.add_argument("--images", type=Path, required=True, help="folder of images, or of webdataset .tar shards")
    else:
        parser.add_argument("--videos", type=Path, required=True, help="folder of videos, or of webdataset .tar shards")
        _video_options(parser)
    _options(parser, kind)
    add_options(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        sizes = [Size.parse(text) for text in args.bucket]
        pace = Pace() if images else Pace(args.fps, args.interval)
        share = Share.parse(args.share)
        shards = find_media(getattr(args, kind), IMAGES if images else VIDEOS, captions=args.captions)
    except (ValueError, OSError) as problem:
        raise UserError(str(problem)) from None
    encoders = build(args)
    if args.raw and encoders.statistics is None:
        raise UserError("--raw: this VAE has no statistics of its latents: leave --raw out")
    ranks, rank = distributed.world_size(), distributed.rank()
    try:
        check_sizes(sizes, encoders.temporal, encoders.spatial)
        headers = {"cache": args.headers, "max_corrupt": args.max_corrupt}
        if images:
            plan = plan_clips(shards, [replace(s, frames=1) for s in sizes], pace, header=probe_image, **headers)
            clips: VideoClips = ImageClips(shards, plan, sizes)
        else:
            plan = plan_clips(shards, sizes, pace, **headers)
            clips = VideoClips(shards, plan, sizes, pace, Start(args.start))
        job = Job(
            args.out,
            encoders.settings,
            rows=args.rows,
            batch=args.batch,
            share=Share(share.index * ranks + rank, share.count * ranks),
            dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
            show=rank == 0,
        )
        raw = encoders.statistics if args.raw else None
        encoding = Encoding(encoders.video, encoders.text, encoders.visual, raw)
        report = encode_videos(clips, encoding, job, kind=args.format, max_corrupt=args.max_corrupt)
    except (ValueError, OSError) as problem:
        raise UserError(str(problem)) from None
    left = f", {len(report.corrupt)} corrupt samples left out" if report.corrupt else ""
    print(f"{args.out}: {report.made} files made ({report.rows} rows{left}), {report.present} were there")
    return 0


def _options(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--captions", type=Path, help=".csv, .jsonl, .json or .parquet of files and captions")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files; those that are there are skipped")
    parser.add_argument(
        "--bucket", action="append", required=True, metavar="TxHxW", help="of the videos, such as 81x480x832; repeat it"
    )
    parser.add_argument("--format", default="parquet", choices=SUFFIXES, help="parquet has FastVideo's columns")
    parser.add_argument("--raw", action="store_true", help="store latents un-normalised, as FastVideo does")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="FastVideo reads fp32 only")
    parser.add_argument("--rows", type=int, default=64, help=f"{kind} to a file")
    parser.add_argument("--batch", type=int, default=1, help=f"{kind} encoded together")
    parser.add_argument("--share", default="0/1", metavar="i/n", help="files i, i + n, ... for one of n jobs, from 0")
    parser.add_argument("--headers", type=Path, help=f"a .json file that keeps the {kind}' headers from run to run")
    parser.add_argument("--max_corrupt", "--max-corrupt", type=float, default=MAX_CORRUPT, help="a share")


def _video_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fps", type=float, help="frames a second of the clips (default: the video's own)")
    parser.add_argument("--interval", type=int, default=1, help="or every n-th frame")
    parser.add_argument(
        "--start", default="first", choices=("first", "middle"), help="where in a video its clip begins"
    )
