"""`python inference.py --run logs/x --prompt "..." --out videos`: videos from a run, also under torchrun."""

from __future__ import annotations

import os
from datetime import timedelta

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from generation.command import inference_args, open_generator
from generation.videos import check_out, generate_videos
from utils import distributed
from utils.cli import run_cli


def main() -> int:
    args = inference_args()
    check_out(args)
    distributed.init(timedelta(days=7))  # ranks whose videos are done wait for those who make theirs
    return generate_videos(open_generator(args, distributed.device()), args)


if __name__ == "__main__":
    run_cli(main)
