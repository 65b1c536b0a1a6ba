"""`python preprocess.py text ...`: what training reads, made once and ahead of it. Each command has its own --help."""

from __future__ import annotations

import os
import sys

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from collections.abc import Callable, Sequence

from generation.ode_pairs import preprocess_ode
from generation.preprocess_text import preprocess_text
from tasks.preprocess_video import preprocess_images, preprocess_video
from utils.cli import run_cli
from utils.errors import UserError

# name -> what runs it with the arguments that follow, and returns the exit code
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "text": preprocess_text,  # prompts -> embeddings
    "video": preprocess_video,  # videos -> latents
    "images": preprocess_images,  # first frames -> latents
    "ode": preprocess_ode,  # prompts -> trajectories of a teacher
}


def main() -> int:
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(f"usage: preprocess.py {'|'.join(COMMANDS)} [options]   (preprocess.py COMMAND --help lists them)")
        return 0
    if name not in COMMANDS:
        raise UserError(f"command '{name}' is unknown: choose {' or '.join(COMMANDS)}, as in preprocess.py text --help")
    return COMMANDS[name](rest)


if __name__ == "__main__":
    run_cli(main)
