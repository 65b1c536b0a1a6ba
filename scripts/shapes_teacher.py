"""`python -m scripts.shapes_teacher`: writes the trained teacher of the world of shapes as the asset that ships.

It takes the runs of `configs/shapes/teacher.yaml` and `configs/shapes/teacher_details.yaml`, and writes the averaged
weights of the second to `assets/shapes_teacher`. Beside them lie what made them: commands, configs, seeds, losses of
every iteration, and the weights' digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from configs.load import load_run
from generation.export import ExportArgs, export
from model.export import Dtype
from utils.cli import Parser, run_cli
from utils.config import to_yaml
from utils.errors import UserError
from utils.logging import read_jsonl

STAGES = ("teacher", "teacher_details")  # of configs/shapes
COMMAND = "OMP_NUM_THREADS=1 python train.py --config_path {config}"
LOGGED = ("step", "student/loss", "student/grad_norm", "student/lr")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def digest(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def losses(run: Path, steps: int) -> list[dict[str, float]]:
    """What LOGGED names of each iteration of a run. Raises UserError unless they are steps 1 to `steps`."""
    lines = {int(line["step"]): line for line in read_jsonl(run / "metrics.jsonl") if "student/loss" in line}
    if sorted(lines) != list(range(1, steps + 1)):
        raise UserError(f"{run}: its log has {len(lines)} iterations of {steps}: train it to the end")
    return [{name: lines[step][name] for name in LOGGED} for step in sorted(lines)]


def write(runs: Path, out: Path) -> None:
    """The asset, of the runs in this folder that are named as the recipes. Raises UserError."""
    configs = {stage: Path(f"configs/shapes/{stage}.yaml") for stage in STAGES}
    logs = {stage: losses(runs / stage, load_run(config).training.max_steps) for stage, config in configs.items()}
    export(ExportArgs(runs / STAGES[-1], "native", out, Dtype.fp32, "ema", "student", shard_bytes=None))
    training = out / "training"
    training.mkdir()
    for stage, config in configs.items():
        run = load_run(config)
        (training / f"{stage}.yaml").write_text(to_yaml(run))
        (training / f"{stage}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logs[stage]))
    record = {
        "commands": [COMMAND.format(config=config) for config in configs.values()],
        "seeds": {stage: load_run(config).seed for stage, config in configs.items()},
        "torch": torch.__version__,
        "sha256": {WEIGHTS: digest(out / WEIGHTS)},
    }
    (training / "record.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> int:
    parser = Parser(prog="python -m scripts.shapes_teacher", description="Write the teacher of shapes as an asset.")
    parser.add_argument("--root", type=Path, default=Path("logs/shapes"), help="folder of the two runs")
    parser.add_argument("--out", type=Path, default=Path("assets/shapes_teacher"), help="a folder that is new or empty")
    args = parser.parse_args()
    write(args.root, args.out)
    print(f"{digest(args.out / WEIGHTS)}  {args.out / WEIGHTS}")
    return 0


if __name__ == "__main__":
    run_cli(main)
