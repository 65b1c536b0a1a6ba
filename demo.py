"""`python demo.py --run logs/x`: a web page where one types a prompt and watches the video while it is made."""

from __future__ import annotations

import os

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from typing import Any

import torch

from generation.generator import Generator
from generation.pretrained import Model, load_model
from generation.sampling import StudentChoice
from serving.command import DemoArgs, demo_args
from serving.run import demo
from utils import distributed
from utils.cli import refuse_several_ranks, run_cli


def main() -> int:
    args = demo_args()
    refuse_several_ranks("demo.py")
    return demo(lambda: open_generator(args, distributed.device()), args)


def open_generator(args: DemoArgs, device: torch.device) -> Generator:
    """Loads what the command names. Raises UserError."""
    options: dict[str, Any] = {"tiny_decoder": args.tiny_decoder, "acceleration": args.acceleration}
    if isinstance(args.source, Model):
        return load_model(args.source, args.sampling(args.seed or 0), device, **options)
    return Generator.load(args.source, device, student=StudentChoice(args.weights), **options)


if __name__ == "__main__":
    run_cli(main)
