"""Tests: a folder for each room of the project; distributed, slurm and gpu need several processes, Slurm or a GPU."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
