"""`python export.py --run logs/x --format diffusers --out DIR`: writes a run's network for other programs."""

from __future__ import annotations

import os

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from generation.export import main
from utils.cli import run_cli

if __name__ == "__main__":
    run_cli(main)
