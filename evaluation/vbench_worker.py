"""Scores videos with the vbench package: run by `evaluation/vbench_suite.py` with an interpreter that has it.

It needs an environment of its own (vbench 0.1.5 asks for another transformers and numpy than this project), so this
file imports nothing of the project. Argument: a JSON object; keys: see `main`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(asked: dict[str, Any]) -> None:
    """Scores videos, a dimension at a time. Keys of `asked`:

    videos: their folder.
    out: folder of the results, `DIMENSION_eval_results.json`.
    full_info: VBench's list of prompts.
    dimensions: to score.
    device: torch's name of it.
    flicker: name of the dimension whose videos are filtered first.
    """
    import torch
    from vbench import VBench

    judge = VBench(torch.device(asked["device"]), asked["full_info"], asked["out"])
    for dimension in asked["dimensions"]:
        videos = asked["videos"]
        if dimension == asked["flicker"]:
            videos = _still(videos, Path(asked["out"]) / "still")
        # local: all models from VBench's own cache
        judge.evaluate(
            videos_path=videos, name=dimension, dimension_list=[dimension], local=True, mode="vbench_standard"
        )


def _still(videos: str, out: Path) -> str:
    """VBench's static filter: the folder with the first five still videos of each prompt that flicker is judged on."""
    from vbench.cli.vbench import main as command

    sys.argv = ["vbench", "static_filter", "--videos_path", videos, "--result_path", str(out)]
    command()
    return str(out / "filtered_videos")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(json.loads(sys.argv[1]))
