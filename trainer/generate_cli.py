"""The command line of inference.py: prompts in, video files out, resumable."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.bidirectional_inference import Solver
from trainer.footage import FootageArgs, footage_args, read_footage
from trainer.generate import Generator, Sampling, slug
from trainer.pretrained import Model, load_model
from utils.cli import Parser
from utils.config import UserError
from utils.data.prompts import load_prompts
from utils.video import write_video


@dataclass(frozen=True)
class InferenceArgs:
    """What inference.py was asked to do. source: a run or checkpoint folder, or a released model; out: a folder, or a
    file for one prompt."""

    source: Path | Model
    low_run: Path | None  # of the low-noise expert
    prompts: tuple[str, ...]
    out: Path
    sampling: Sampling
    weights: str
    suffix: str
    fps: int
    scale: int | None  # null enlarges small videos
    batch: int
    footage: FootageArgs
    from_file: bool
    image_encoder: str | None = None  # null takes the run's own


def _parser() -> Parser:
    parser = Parser(prog="inference.py", description="Generate videos from a trained run.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder: its latest checkpoint is used")
    source.add_argument("--checkpoint", type=Path, help="one checkpoint folder")
    parser.add_argument("--low_run", type=Path, help="run of the low-noise expert, beside --run of the high-noise one")
    source.add_argument("--model", metavar="DIR", help="a released model in Diffusers' layout: a folder, or a Hub name")
    parser.add_argument("--size", metavar="HxW", help="of --model's videos, in pixels (480x832)")
    parser.add_argument("--shift", type=float, help="of --model's noise levels (default: its scheduler's)")
    parser.add_argument("--negative_prompt", help="of --model (default: none)")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="one prompt")
    text.add_argument("--prompts", type=Path, help="file of prompts (.txt, .csv, .jsonl); finished ones are skipped")
    parser.add_argument("--out", type=Path, default=Path("videos"), help="folder, or a file for one prompt")
    parser.add_argument("--frames", type=int, help="latent frames in all (default: as trained)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as trained)")
    parser.add_argument("--window", type=int, help="latent frames that a block sees; needed to go on without end")
    parser.add_argument("--sinks", type=int, help="first latent frames that stay in the window")
    parser.add_argument("--guidance", type=float, help="of a many-step network (default: its config's)")
    parser.add_argument("--guidance_2", type=float, help="of the low-noise expert, where a model has two")
    parser.add_argument("--solver", choices=[s.value for s in Solver], help="of a many-step network (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--image", type=Path, help="first frame of the video (image-to-video)")
    given.add_argument("--video", type=Path, help="a clip, with --strength or --extend")
    parser.add_argument(
        "--image_encoder", metavar="DIR",
        help="a folder with CLIP, for a run that trained on stored tokens of images (its data.image_encoder is null)",
    )  # fmt: skip
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--strength", type=float, help="make --video anew: share of the steps, 1 keeps nothing of it")
    use.add_argument(
        "--extend", type=int, nargs="?", const=0, metavar="N", help="go on from --video's last N latent frames"
    )
    parser.add_argument("--weights", choices=("ema", "raw"), help="of --run (default: the average)")
    parser.add_argument("--format", choices=("mp4", "gif", "png"), default="mp4", help="png is a strip of frames")
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--scale", type=int, help="whole factor to enlarge pixels by (default: to a width of 128)")
    parser.add_argument("--batch", type=int, default=8, help="videos made at once")
    return parser


def inference_args(argv: Sequence[str] | None = None) -> InferenceArgs:
    """Parses the command line. Raises UserError."""
    a = _parser().parse_args(argv)
    for name in ("frames", "steps", "fps", "scale", "batch"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number of at least 1")
    try:
        prompts = (a.prompt,) if a.prompt is not None else tuple(load_prompts(a.prompts))
    except (ValueError, OSError) as problem:
        raise UserError(f"--prompts: {problem}") from None
    suffix = a.out.suffix.lstrip(".") if a.prompt is not None and a.out.suffix else a.format
    if suffix not in ("mp4", "gif", "png"):
        raise UserError(f"--out {a.out}: unknown format .{suffix}: use .mp4, .gif or .png")
    source_of = _model(a) if a.model is not None else a.run or a.checkpoint
    if a.model is None and (odd := [name for name in ("size", "shift", "negative_prompt") if getattr(a, name)]):
        raise UserError(f"--{odd[0]} is for --model: a run has its own")
    if a.model is not None:
        refused = {
            "low_run": "a released model has both experts in its folder",
            "weights": "a model has one set of them",
        }
        refused |= {"image_encoder": "a model's folder has its own"}
        for name, why in refused.items():
            if getattr(a, name) is not None:
                raise UserError(f"--{name} is for runs: {why}")
    if a.shift is not None and a.shift <= 0:
        raise UserError(f"--shift {a.shift}: give a positive number, 1 for none")
    footage = footage_args(a)
    sampling = Sampling(a.steps, a.frames, a.window, a.sinks, a.guidance, a.seed, a.guidance_2, a.solver, a.strength)
    return InferenceArgs(
        source_of,
        a.low_run,
        prompts,
        a.out,
        sampling,
        a.weights or "ema",
        suffix,
        a.fps,
        a.scale,
        a.batch,
        footage,
        a.prompts is not None,
        a.image_encoder,
    )


def _model(a: argparse.Namespace) -> Model:
    found = re.fullmatch(r"(\d+)x(\d+)", a.size or "480x832")
    if found is None:
        raise UserError(f"--size {a.size}: give height x width in pixels, such as 480x832")
    return Model(a.model, int(found[1]), int(found[2]), a.shift, a.negative_prompt or "")


def open_generator(args: InferenceArgs, device: torch.device) -> Generator:
    """What the command names, loaded. Raises UserError."""
    if isinstance(args.source, Model):
        return load_model(args.source, args.sampling.frames, device)
    options: dict[str, Any] = {"weights": args.weights, "image_encoder": args.image_encoder}
    generator = Generator.load(args.source, device, **options)
    if args.low_run is None:
        return generator
    return generator.with_low(Generator.load(args.low_run, device, **options))


def generate_videos(generator: Generator, args: InferenceArgs) -> int:
    """Writes one file a prompt and says where; of a prompt file those that exist are skipped. Returns the exit code."""
    one = len(args.prompts) == 1 and bool(args.out.suffix)
    resumable = not one and args.from_file
    paths = [args.out / f"{i:04d}_{slug(prompt)}.{args.suffix}" for i, prompt in enumerate(args.prompts)]
    if one:
        paths = [args.out]
    elif args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")
    if resumable:
        _same_settings(args)
    todo = [i for i, path in enumerate(paths) if not (resumable and path.is_file())]
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} videos are there already")
    footage = read_footage(generator, args.footage, args.sampling)
    frames, first, started = 0, 0.0, time.perf_counter()
    for start in tqdm(range(0, len(todo), args.batch), desc="videos", disable=None):
        ids = todo[start : start + args.batch]
        parts, decode = [], generator.task.decoding()
        for block in generator.stream([args.prompts[i] for i in ids], args.sampling, ids, *footage):
            parts.append(decode(block).cpu())
            first = first or time.perf_counter() - started
        for index, pixels in zip(ids, torch.cat(parts, dim=1), strict=True):
            write_video(paths[index], pixels, args.fps, args.scale or max(1, 128 // pixels.shape[-1]))
            frames += pixels.shape[0]
    seconds = time.perf_counter() - started
    rate = frames / max(seconds, 1e-9)
    print(
        f"{len(todo)} videos, {frames} frames in {seconds:.1f} s ({rate:.1f} frames/s, the first after {first:.2f} s) "
        f"-> {args.out}"
    )
    return 0


def _same_settings(args: InferenceArgs) -> None:
    """Keeps what the folder's videos were made with beside them, and refuses to go on with anything else."""
    settings = {
        "source": str(args.source),
        "low_run": str(args.low_run),
        "weights": args.weights,
        "image": str(args.footage.image),
        "video": None if args.footage.video is None else str(args.footage.video),
        "extend": args.footage.extend,
        "image_encoder": args.image_encoder,
        "scale": args.scale,
        "fps": args.fps,
        "prompts": hashlib.sha256("\n".join(args.prompts).encode()).hexdigest(),
        **asdict(args.sampling),
    }
    file = args.out / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they come back
    if file.is_file():
        there = json.loads(file.read_text())
        changed = sorted(key for key in settings if there.get(key) != settings[key])
        if changed:
            raise UserError(
                f"the videos in {args.out} were made with other settings ({', '.join(changed)}): give another --out"
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1))
    except OSError as problem:
        raise UserError(f"--out {args.out}: {problem.strerror}: give a folder that can be written") from None
