"""The command line of inference.py: prompts in, video files out, resumable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trainer.generate import Generator, Sampling, slug
from utils.cli import Parser
from utils.config import UserError
from utils.data.prompts import load_prompts
from utils.video import read_image, write_video


@dataclass(frozen=True)
class InferenceArgs:
    """What inference.py was asked to do. source: run or checkpoint folder; out: a folder, or a file for one prompt."""

    source: Path
    prompts: tuple[str, ...]
    out: Path
    sampling: Sampling
    weights: str
    suffix: str
    fps: int
    scale: int
    batch: int
    image: Path | None


def inference_args(argv: Sequence[str] | None = None) -> InferenceArgs:
    """Parses the command line. Raises UserError."""
    parser = Parser(prog="inference.py", description="Generate videos from a trained run.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder: its latest checkpoint is used")
    source.add_argument("--checkpoint", type=Path, help="one checkpoint folder")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="one prompt")
    text.add_argument("--prompts", type=Path, help="file of prompts (.txt, .csv, .jsonl); finished ones are skipped")
    parser.add_argument("--out", type=Path, default=Path("videos"), help="folder, or a file for one prompt")
    parser.add_argument("--frames", type=int, help="latent frames in all (default: as trained)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as trained)")
    parser.add_argument("--window", type=int, help="latent frames that a block sees; needed to go on without end")
    parser.add_argument("--sinks", type=int, help="first latent frames that stay in the window")
    parser.add_argument("--guidance", type=float, help="of a many-step teacher (default: its config's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="first frame of the video (image-to-video)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--format", choices=("mp4", "gif", "png"), default="mp4", help="png is a strip of frames")
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--scale", type=int, default=8, help="whole factor by which pixels are enlarged")
    parser.add_argument("--batch", type=int, default=8, help="videos made at once")
    a = parser.parse_args(argv)
    for name in ("frames", "steps", "fps", "scale", "batch"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number of at least 1")
    prompts = (a.prompt,) if a.prompt is not None else tuple(load_prompts(a.prompts))
    suffix = a.out.suffix.lstrip(".") if a.prompt is not None and a.out.suffix else a.format
    if suffix not in ("mp4", "gif", "png"):
        raise UserError(f"--out {a.out}: unknown format .{suffix}: use .mp4, .gif or .png")
    sampling = Sampling(a.steps, a.frames, a.window, a.sinks, a.guidance, a.seed)
    return InferenceArgs(
        a.run or a.checkpoint, prompts, a.out, sampling, a.weights, suffix, a.fps, a.scale, a.batch, a.image
    )


def generate_videos(generator: Generator, args: InferenceArgs) -> int:
    """Writes one file a prompt, skipping those that exist, and says where. Returns the exit code."""
    one_file = bool(args.out.suffix) and len(args.prompts) == 1
    paths = [args.out / f"{i:04d}_{slug(prompt)}.{args.suffix}" for i, prompt in enumerate(args.prompts)]
    todo = [0] if one_file else [i for i, path in enumerate(paths) if not path.is_file()]
    if one_file:
        paths = [args.out]
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} videos are there already")
    image = None if args.image is None else read_image(args.image)[None]
    if image is not None and image.ndim > 4:
        image = image[0]
    frames, started = 0, time.perf_counter()
    for start in tqdm(range(0, len(todo), args.batch), desc="videos", disable=None):
        ids = todo[start : start + args.batch]
        latents = generator([args.prompts[i] for i in ids], args.sampling, ids, image)
        for index, pixels in zip(ids, generator.task.decode(latents), strict=True):
            paths[index].parent.mkdir(parents=True, exist_ok=True)
            write_video(paths[index], pixels, args.fps, args.scale)
            frames += pixels.shape[0]
    seconds = time.perf_counter() - started
    print(
        f"{len(todo)} videos, {frames} frames in {seconds:.1f} s ({frames / max(seconds, 1e-9):.1f} frames/s) "
        f"-> {args.out}"
    )
    return 0
