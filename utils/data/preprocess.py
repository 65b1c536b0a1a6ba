"""`python -m utils.data.preprocess`, the name of `python preprocess.py` in version 0.1."""

from __future__ import annotations

from utils.moved import run_moved

if __name__ == "__main__":
    run_moved("preprocess.py", "python -m utils.data.preprocess")
