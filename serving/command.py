"""The command line of demo.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from generation.acceleration import Acceleration
from generation.command import acceleration_of, add_model, add_speed, model_of, refuse_without_model, step_count
from generation.sampling import Sampling
from generation.students import Model
from serving.limits import Limits
from serving.protocol import MAX_SEED
from utils.cli import Parser
from utils.errors import UserError


@dataclass(frozen=True)
class DemoArgs:
    """What demo.py was asked to do.

    source: a run's folder or a checkpoint's, or a released model.
    weights: "ema" or "raw".
    steps: denoising steps; None is as trained, or as published.
    window: latent frames that a block sees; None is as trained.
    sinks: first latent frames that stay in the window; None is as trained.
    seed: of videos that ask for none; None draws one for each.
    noisy_context: whether the extra pass over finished blocks is left out.
    recache: whether a changed prompt acts sooner, at the cost of a pass.
    host: address to listen on.
    port: to listen on; 0 takes a free one.
    allow_host: names, beside addresses and localhost, by which browsers may reach the demo.
    fps: frames a second, at most on the page, and of the download; None is the run's.
    scale: whole factor that enlarges the download; None enlarges a small video.
    tiny_decoder: file of a small decoder; None decodes with the run's own.
    acceleration: how the networks are sped up.
    limits: bounds of the server.
    """

    source: Path | Model
    weights: str
    steps: int | None
    window: int | None
    sinks: int | None
    seed: int | None
    noisy_context: bool
    recache: bool
    host: str
    port: int
    allow_host: tuple[str, ...]
    fps: int | None
    scale: int | None
    tiny_decoder: str | None
    acceleration: Acceleration
    limits: Limits

    def sampling(self, seed: int) -> Sampling:
        return Sampling(
            steps=self.steps, window=self.window, sinks=self.sinks, seed=seed, noisy_context=self.noisy_context
        )


def _parser() -> Parser:
    parser = Parser(prog="demo.py", description="A web page that shows a causal student's videos as they are made.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder: its latest checkpoint is used")
    source.add_argument("--checkpoint", type=Path, help="one checkpoint folder")
    add_model(parser, source)
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: the average, or as published")
    parser.add_argument("--window", type=int, help="latent frames that a block sees (default: as trained)")
    parser.add_argument("--sinks", type=int, help="first latent frames that stay in the window (default: as trained)")
    parser.add_argument("--noisy_context", action="store_true", help="no extra pass over finished blocks: faster")
    parser.add_argument("--recache", action="store_true", help="a changed prompt acts sooner, at a pass more")
    parser.add_argument("--seed", type=int, help="of videos whose visitor gives none (default: one drawn for each)")
    parser.add_argument("--fps", type=int, help="at most, on the page; of the download (default: the run's)")
    parser.add_argument("--scale", type=int, help="whole factor that enlarges the download (default: to width 256)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: 7860)")
    parser.add_argument("--allow_host", action="append", default=[], metavar="NAME", help="of this host, in a URL")
    add_speed(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--users", type=int, help="videos made at the same time")
    limits.add_argument("--waiting", type=int, help="visitors in line for a place")
    limits.add_argument("--connections", type=int, help="open pages in all")
    limits.add_argument("--max_frames", type=int, help="pixel frames of a video, which then ends")
    limits.add_argument("--prompt_chars", type=int, help="characters of a prompt")
    limits.add_argument("--message_bytes", type=int, help="of a message from a visitor")
    limits.add_argument("--messages_per_second", type=int, help="from a visitor, on average")
    limits.add_argument("--mistakes", type=int, help="wrong messages for a video that end a connection")
    limits.add_argument("--ahead", type=int, help="frames that are made before earlier ones are shown")
    limits.add_argument("--idle_seconds", type=int, help="without a viewer, until a video loses its place")
    limits.add_argument("--rest_seconds", type=int, help="until a connection without a video in the making is closed")
    limits.add_argument("--grace_seconds", type=int, help="that a video can be fetched after its page is gone")
    limits.add_argument("--place_seconds", type=int, help="that a video keeps its place while others wait")
    limits.add_argument("--send_seconds", type=int, help="that a visitor's machine may read nothing, or ask nothing")
    limits.add_argument("--downloads", type=int, help="made and sent at the same time")
    limits.add_argument("--download_seconds", type=int, help="that sending one may take")
    parser.set_defaults(**{field.name: field.default for field in fields(Limits)})
    return parser


def demo_args(argv: Sequence[str] | None = None) -> DemoArgs:
    """Parses the command line (``sys.argv`` by default). Raises UserError."""
    args = _parser().parse_args(argv)
    for name, least, most in (("fps", 1, 120), ("scale", 1, 64), ("port", 0, 65535), ("seed", 0, MAX_SEED)):
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            raise UserError(f"--{name} {value}: give a number from {least} to {most}")
    bounds = {field.name: getattr(args, field.name) for field in fields(Limits)}
    try:
        limits = Limits(**bounds)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if args.model is None:
        refuse_without_model(args)
        if args.size is not None:
            raise UserError("--size is for --model: a run's videos have the size that it was trained in")
    return DemoArgs(
        source=args.run or args.checkpoint if args.model is None else model_of(args),
        weights=args.weights or "ema",
        steps=step_count(args),
        window=args.window,
        sinks=args.sinks,
        seed=args.seed,
        noisy_context=args.noisy_context,
        recache=args.recache,
        host=args.host,
        port=args.port,
        allow_host=tuple(args.allow_host),
        fps=args.fps,
        scale=args.scale,
        tiny_decoder=args.tiny_decoder,
        acceleration=acceleration_of(args),
        limits=limits,
    )
