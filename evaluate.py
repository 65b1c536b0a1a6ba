"""`python evaluate.py --run logs/x [--suite toy|fid|vbench]`: judges a run's videos."""

from __future__ import annotations

import os

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from evaluation.command import main
from utils.cli import run_cli

if __name__ == "__main__":
    run_cli(main)
