"""`python -m evaluation.command`, the name of `python evaluate.py` in version 0.1."""

from __future__ import annotations

from utils.moved import run_moved

if __name__ == "__main__":
    run_moved("evaluate.py", "python -m evaluation.command")
