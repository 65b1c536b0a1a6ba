"""`python -m trainer.export`, the name of `python export.py` in version 0.1."""

from __future__ import annotations

from utils.moved import run_moved

if __name__ == "__main__":
    run_moved("export.py", "python -m trainer.export")
