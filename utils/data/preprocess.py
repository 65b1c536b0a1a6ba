"""`python -m utils.data.preprocess text|video|ode ...` is `python preprocess.py text|video|ode ...`.

The commands need trainers, which stand above this package: the script is run as the program that it is.
"""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "preprocess.py"

if __name__ == "__main__":
    runpy.run_path(str(SCRIPT), run_name="__main__")
