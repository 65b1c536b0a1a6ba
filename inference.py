"""`python inference.py --run logs/x --prompt "..." --out videos`: videos from a run, also under torchrun."""

from __future__ import annotations

import os
from datetime import timedelta

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from generation.command import inference_args, open_generator
from generation.videos import check_out, generate_videos
from utils import distributed
from utils.cli import run_cli
from utils.logging import warn


def main() -> int:
    args = inference_args()
    check_out(args)
    warn(distributed.unused_gpus())
    distributed.init(timedelta(days=7))  # ranks whose videos are done wait for those who make theirs
    return generate_videos(open_generator(args, distributed.device()), args)


if __name__ == "__main__":
    run_cli(main)
