"""The command line of inference.py: what it is asked for, and the network that this names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from generation.acceleration import Acceleration
from generation.footage import FootageArgs, footage_args
from generation.generator import Generator
from generation.pretrained import Model, load_model
from generation.sampling import Sampling, StudentChoice
from generation.students import layouts
from model.network import Expert, LoraWeights
from pipeline.bidirectional_inference import Solver
from utils.cli import Parser, text_encoding
from utils.data.prompts import load_prompts
from utils.errors import UserError
from utils.limits import FPS, SHIFT, SIDE
from utils.reading import UTF8

FORMATS = ("mp4", "gif", "png", "safetensors")
STEPS_HELP = (
    "denoising steps (default: as trained, or as published); of a --model that is a few-step student also its list of "
    "timesteps, 1000,750,500,250 or 1000, for one step"
)
FORMATS_HELP = "png is a strip of frames, safetensors the latents [F, C, H, W] as they are"


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
    fps: int | None  # None takes the run's
    scale: int | None  # None enlarges small videos
    batch: int | None  # None is chosen by the free memory
    footage: FootageArgs
    from_file: bool
    image_encoder: str | None = None  # None takes the run's own
    size: tuple[int, int] | None = None  # height and width of a run's videos in pixels, None for as trained
    loras: tuple[LoraWeights, ...] = ()
    low_loras: tuple[LoraWeights, ...] = ()
    lora_scale: float = 1.0  # of the run's own adapter
    tiny_decoder: str | None = None
    acceleration: Acceleration = Acceleration()
    sequence: int = 1  # processes that share a video


def _parser() -> Parser:
    parser = Parser(prog="inference.py", description="Generate videos from a trained run.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder: its latest checkpoint is used")
    source.add_argument("--checkpoint", type=Path, help="one checkpoint folder")
    parser.add_argument("--low_run", type=Path, help="run of the low-noise expert, beside --run of the high-noise one")
    add_model(parser, source)
    parser.add_argument("--negative_prompt", help="of a many-step --model (default: none)")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="one prompt")
    text.add_argument(
        "--prompts", type=Path,
        help="file of prompts (.txt, .csv, .jsonl, .parquet), or folder of .parquet; finished ones are skipped",
    )  # fmt: skip
    parser.add_argument("--encoding", type=text_encoding, help="of --prompts (default: UTF-8)")
    parser.add_argument("--out", type=Path, default=Path("videos"), help="folder, or a file for one prompt")
    parser.add_argument("--frames", type=int, help="latent frames in all (default: as trained)")
    parser.add_argument(
        "--block_steps", type=_counts, default=(), metavar="N,N,...",
        help="steps of a causal student's first block, its second, ..., the last for all after",
    )  # fmt: skip
    parser.add_argument(
        "--noisy_context", action="store_true",
        help="a causal student sees its last denoising pass's keys and values: one forward less for each block",
    )  # fmt: skip
    parser.add_argument("--window", type=int, help="latent frames that a block sees (default: as trained)")
    parser.add_argument("--sinks", type=int, help="first latent frames that stay in the window (default: as trained)")
    parser.add_argument("--guidance", type=float, help="of a many-step network (default: its config's)")
    parser.add_argument("--guidance_2", type=float, help="of the low-noise expert of two (default: --guidance)")
    parser.add_argument("--solver", choices=[s.value for s in Solver], help="of a many-step network (default: its own)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    footage = parser.add_mutually_exclusive_group()
    footage.add_argument("--image", type=Path, help="first frame of the video (image-to-video)")
    footage.add_argument("--video", type=Path, help="a clip, with --strength or --extend")
    parser.add_argument(
        "--image_encoder", metavar="DIR",
        help="a folder with CLIP, for a run on stored tokens of images (default: its own, or its pipeline's)",
    )  # fmt: skip
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--strength", type=float, help="make --video anew: share of the steps, 1 keeps nothing of it")
    use.add_argument(
        "--extend", type=int, nargs="?", const=0, metavar="N", help="go on from --video's last N latent frames"
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE",
        help="a LoRA on top, also several",
    )
    parser.add_argument("--low_lora", action="append", default=[], metavar="FILE", help="of the low-noise expert")
    parser.add_argument(
        "--lora_scale",
        type=_strengths,
        metavar="S|HIGH,LOW",
        help="by how much --lora counts, and --low_lora; without one, the run's own adapter (default: 1)",
    )
    speed = add_speed(parser)
    speed.add_argument(
        "--sequence_parallel", type=int, default=1, metavar="N",
        help="under torchrun: so many processes share each video (1: each makes videos of its own)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("ema", "raw"),
        help="of --run (default: the average), or of a --model by itself (default: those that its settings are for)",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="mp4", help=FORMATS_HELP)
    parser.add_argument("--fps", type=int, help="frames a second (default: the run's; Wan 16, its 5B 24, toys 8)")
    parser.add_argument("--scale", type=int, help="whole factor to enlarge pixels by (default: to a width of 128)")
    parser.add_argument("--batch", type=int, help="videos made at once (default: what fits into memory, at most 8)")
    return parser


def add_model(parser: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup) -> None:
    """The options of a released model, for `model_of`, and those that a run has too."""
    source.add_argument(
        "--model", metavar="X",
        help="a released model: a folder in Diffusers' layout, a file of weights, or a Hub name. Known students (Self-"
        "Forcing, CausVid, LongLive, ...) bring their published settings. docs/inference.md lists them",
    )  # fmt: skip
    parser.add_argument("--steps", type=step_choice, metavar="N|N,N,...", help=STEPS_HELP)
    parser.add_argument(
        "--size", metavar="HxW", help="of videos in pixels (default: as trained, or as --model was released)"
    )
    model = parser.add_argument_group("a released model (--model)")
    model.add_argument("--shift", type=float, help="of its noise levels (default: its scheduler's, or as published)")
    model.add_argument("--layout", metavar="NAME", help=f"whose student it is: {', '.join(layouts())}")
    model.add_argument("--block_frames", type=int, metavar="N", help="latent frames of a student's block, 0: no blocks")
    model.add_argument(
        "--base", metavar="DIR", help="whose text encoder and VAE go with a file of weights (default: its geometry's)"
    )
    model.add_argument("--config_path", type=Path, metavar="YAML", help="the run that a file of weights is of")


def step_choice(text: str) -> int | tuple[float, ...]:
    """A number of steps, or a list of timesteps: what has a comma."""
    try:
        if "," not in text:
            return int(text)
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor a list such as 1000,750") from None


def step_count(a: argparse.Namespace) -> int | None:
    """Raises UserError for a list beside a run, and for less than one step."""
    if isinstance(a.steps, tuple):
        if a.model is None or a.config_path is not None:
            raise UserError("--steps: a list is for --model without --config_path: a run has its own: give a number")
        return None
    if a.steps is not None and a.steps < 1:
        raise UserError(f"--steps {a.steps}: give a number of at least 1")
    return None if a.steps is None else int(a.steps)


def model_of(a: argparse.Namespace, negative: str = "") -> Model:
    """The released model that the options name. Raises UserError."""
    if a.shift is not None and not 0 < a.shift <= SHIFT:
        raise UserError(f"--shift {a.shift}: give a positive number of at most {SHIFT}, 1 for none")
    if a.block_frames is not None and a.block_frames < 0:
        raise UserError(f"--block_frames {a.block_frames}: give a number of frames, 0 for a bidirectional student")
    if a.config_path is not None:
        for name in ("shift", "layout", "block_frames", "base"):
            if getattr(a, name) is not None:
                raise UserError(f"--{name}: {a.config_path} says how the model is sampled: leave one of them out")
    height, width = size_of(a) or (None, None)
    steps = a.steps if isinstance(a.steps, tuple) else ()
    return Model(
        a.model, height, width, a.shift, negative, a.layout, a.base, a.config_path, steps, a.block_frames, a.weights
    )


def refuse_without_model(a: argparse.Namespace) -> None:
    """Raises UserError for options of --model beside a run."""
    for name in ("shift", "negative_prompt", "layout", "block_frames", "base", "config_path"):
        if getattr(a, name, None) is not None:
            raise UserError(f"--{name} is for --model: a run has its own")


def add_speed(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that make passes and decoding faster, for `acceleration_of`."""
    speed = parser.add_argument_group("speed")
    speed.add_argument("--compile", action="store_true", help="torch.compile for the blocks: minutes at first")
    speed.add_argument("--fp8", action="store_true", help="linear layers in fp8 (torchao; Ada, Hopper and later)")
    speed.add_argument("--tiny_decoder", metavar="FILE", help="taehv's decoder in place of the VAE's: coarser, faster")
    speed.add_argument("--eager", action="store_true", help="record no CUDA graphs")
    return speed


def acceleration_of(a: argparse.Namespace) -> Acceleration:
    return Acceleration(False if a.eager else None, a.compile, a.fp8)


def inference_args(argv: Sequence[str] | None = None) -> InferenceArgs:
    """Parses the command line. Raises UserError."""
    a = _parser().parse_args(argv)
    for name in ("frames", "fps", "scale", "batch", "sequence_parallel"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number of at least 1")
    if a.fps is not None and a.fps > FPS:
        raise UserError(f"--fps {a.fps}: give a number of at most {FPS}")
    if a.encoding is not None and a.prompts is None:
        raise UserError("--encoding is of a file: give --prompts, or leave it out")
    try:
        prompts = (a.prompt,) if a.prompt is not None else tuple(load_prompts(a.prompts, a.encoding or UTF8))
    except (ValueError, OSError) as problem:
        raise UserError(f"--prompts: {problem}") from None
    suffix = a.out.suffix.lstrip(".") if a.prompt is not None and a.out.suffix else a.format
    if suffix not in FORMATS:
        raise UserError(f"--out {a.out}: unknown format .{suffix}: use {', '.join(f'.{name}' for name in FORMATS)}")
    _refuse_for_others(a)
    source = a.run or a.checkpoint if a.model is None else model_of(a, a.negative_prompt or "")
    footage = footage_args(a)
    strengths: tuple[float, ...] = a.lora_scale or (1.0,)
    if len(strengths) == 2 and not a.low_lora:
        said = ",".join(f"{strength:g}" for strength in strengths)
        raise UserError(f"--lora_scale {said}: two strengths are for two experts: give --low_lora")
    return InferenceArgs(
        source=source,
        low_run=a.low_run,
        prompts=prompts,
        out=a.out,
        sampling=_sampling(a),
        weights=a.weights or "ema",
        suffix=suffix,
        fps=a.fps,
        scale=a.scale,
        batch=a.batch,
        footage=footage,
        from_file=a.prompts is not None,
        image_encoder=a.image_encoder,
        size=size_of(a),
        loras=tuple(LoraWeights(path, strengths[0]) for path in a.lora),
        low_loras=tuple(LoraWeights(path, strengths[-1]) for path in a.low_lora),
        lora_scale=1.0 if a.lora or a.low_lora else strengths[0],
        tiny_decoder=a.tiny_decoder,
        acceleration=acceleration_of(a),
        sequence=a.sequence_parallel,
    )


def _sampling(a: argparse.Namespace) -> Sampling:
    return Sampling(
        steps=step_count(a),
        frames=a.frames,
        window=a.window,
        sinks=a.sinks,
        guidance=a.guidance,
        seed=a.seed,
        guidance_2=a.guidance_2,
        solver=a.solver,
        strength=a.strength,
        block_steps=a.block_steps,
        noisy_context=a.noisy_context,
    )


def _strengths(text: str) -> tuple[float, ...]:
    """One number, or that of each expert: 3.0,1.5."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not 1 <= len(numbers) <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor two with a comma between: high noise, low noise")
    return numbers


def _refuse_for_others(a: argparse.Namespace) -> None:
    """Raises UserError for options of a run beside --model, or of --model beside a run."""
    if a.model is None:
        refuse_without_model(a)
        return
    if a.lora_scale is not None and not a.lora + a.low_lora:
        raise UserError("--lora_scale: --model has no adapter of its own: give --lora too")
    refused = {
        "low_run": "a released model has both experts in its folder",
        "image_encoder": "a model's folder has its own",
    }
    for name, why in refused.items():
        if getattr(a, name) is not None:
            raise UserError(f"--{name} is for runs: {why}")


def size_of(a: argparse.Namespace) -> tuple[int, int] | None:
    if a.size is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", a.size)
    if found is None:
        raise UserError(f"--size {a.size}: give height x width in pixels, such as 480x832")
    if max(len(found[1]), len(found[2])) > 5 or max(int(found[1]), int(found[2])) > 8 * SIDE:
        raise UserError(f"--size {a.size[:40]}: give sides of at most {8 * SIDE} pixels")
    return int(found[1]), int(found[2])


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of at least 1, such as 4,2")
    return tuple(map(int, parts))


def open_generator(args: InferenceArgs, device: torch.device) -> Generator:
    """Loads what the command names. Raises UserError."""
    if isinstance(args.source, Model):
        return load_model(
            args.source, args.sampling, device, loras=args.loras, low_loras=args.low_loras,
            tiny_decoder=args.tiny_decoder, acceleration=args.acceleration,
        )  # fmt: skip
    if args.low_loras and args.low_run is None:
        raise UserError("--low_lora is for a low-noise expert: give its --low_run too")
    options: dict[str, Any] = {
        "image_encoder": args.image_encoder,
        "size": args.size,
        "tiny_decoder": args.tiny_decoder,
        "acceleration": args.acceleration,
    }
    student = StudentChoice(args.weights, args.loras, args.lora_scale)
    if args.low_run is None:
        return Generator.load(args.source, device, student=student, **options)
    high = Generator.load(args.source, device, student=replace(student, expert=Expert.high), **options)
    other = replace(student, loras=args.low_loras, expert=Expert.low)
    return high.with_low(Generator.load(args.low_run, device, student=other, **options))
