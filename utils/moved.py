"""Commands of version 0.1 that have a new name: each prints it, and runs. They go with version 0.3."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_moved(script: str, old: str) -> None:
    """Run `script`, a program at the top of the project, with this process's arguments in place of `old`."""
    print(f"{old} is now: python {script}", file=sys.stderr)
    sys.argv[0] = str(ROOT / script)
    runpy.run_path(sys.argv[0], run_name="__main__")
