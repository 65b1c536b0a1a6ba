"""`python -m trainer.evaluate`, the name of `python evaluate.py` in version 0.1."""

from __future__ import annotations

from utils.moved import run_moved

if __name__ == "__main__":
    run_moved("evaluate.py", "python -m trainer.evaluate")
