"""Tests by room, as the project lies; beside them what needs other machines or processes (distributed, slurm, gpu)."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
