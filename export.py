"""`python export.py --run logs/x --format diffusers --out DIR`: writes a run's network for other programs."""

from __future__ import annotations

import os

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from generation.export import main
from utils.cli import run_cli

if __name__ == "__main__":
    run_cli(main)
