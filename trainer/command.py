"""The command line of train.py."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.family import presets
from trainer.notices import VARIABLE
from utils.cli import Parser

OVERRIDES = "laid over the YAML: seed=1, say, or another YAML, an overlay, which changes what is there"


@dataclass(frozen=True)
class PlanArgs:
    """What to plan for; None is what the recipe is meant for. gpu: a name of planning/hardware.py."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class TrainArgs:
    """What ``train.py`` was asked to do."""

    config_path: Path
    overrides: tuple[str, ...]  # key=value and overlays, laid over the YAML
    logdir: Path
    resume: str  # "auto", "never", "last-good" or a path: see checkpoint.find_resume
    max_steps: int | None  # stop after this step whatever the config says
    wandb: bool
    save: bool
    visualize: bool
    print_config: bool
    plan: PlanArgs | None  # say what the run needs, instead of running it


def train_args(argv: Sequence[str] | None = None) -> TrainArgs:
    """Parse the arguments of ``train.py`` (``sys.argv`` by default). Raises UserError."""
    known = f"presets of networks, as in student.preset=1.3b: {', '.join(presets())}"
    parser = Parser(prog="train.py", description="Train or distil what a YAML file describes.", epilog=known)
    parser.add_argument("--config_path", "--config-path", type=Path, required=True, metavar="YAML", help="of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value|YAML", help=OVERRIDES)
    parser.add_argument("--logdir", type=Path, help="run folder (default: logs/<family>/<method> of the YAML's path)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|last-good|PATH", help="default: auto")
    parser.add_argument(
        "--max_steps",
        "--max-steps",
        type=_positive,
        metavar="N",
        help="stop after step N (default: training.max_steps)",
    )
    parser.add_argument("--disable-wandb", "--disable_wandb", action="store_true")
    parser.add_argument("--no_save", "--no-save", action="store_true", help="write no checkpoints")
    parser.add_argument("--no_visualize", "--no-visualize", action="store_true", help="make no validation videos")
    parser.add_argument("--print_config", "--print-config", action="store_true", help="print it checked, and exit")
    # the launchers of DeepSpeed and of older torch give it, beside the variable LOCAL_RANK, which counts
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    plan = parser.add_argument_group("planning", "what the run would need of its GPUs, found out without one")
    plan.add_argument("--plan", action="store_true", help="print it, and exit")
    plan.add_argument("--nodes", type=_positive, metavar="N", help="default: those that the recipe is meant for")
    plan.add_argument(
        "--gpus_per_node",
        "--gpus-per-node",
        type=_positive,
        metavar="N",
        help="default: those that the recipe is meant for, or 8",
    )
    plan.add_argument(
        "--gpu",
        metavar="NAME",
        help="a100-40, a100-80, h100, h200 (default), b200, l40s, rtx4090",
    )
    # intermixed: overrides may stand before, between and after options
    space = parser.parse_intermixed_args(argv)
    if any(re.match(r"logging\.webhook=(?!null$)", override) for override in space.overrides):
        parser.error(f"logging.webhook: others can read a command line: set {VARIABLE} in the environment")
    if space.local_rank is not None and os.environ.get("LOCAL_RANK") != str(space.local_rank):
        parser.error(f"--local_rank {space.local_rank} is a launcher's, and LOCAL_RANK is not set to it: use torchrun")
    if not space.plan and (space.nodes or space.gpus_per_node or space.gpu):
        parser.error("--nodes, --gpus_per_node and --gpu say what to plan for: add --plan, or start with torchrun")
    return TrainArgs(
        config_path=space.config_path,
        overrides=tuple(space.overrides),
        logdir=space.logdir or default_logdir(space.config_path),
        resume=space.resume,
        max_steps=space.max_steps,
        wandb=not space.disable_wandb,
        save=not space.no_save,
        visualize=not space.no_visualize,
        print_config=space.print_config,
        plan=PlanArgs(space.nodes, space.gpus_per_node, space.gpu) if space.plan else None,
    )


def default_logdir(config_path: Path) -> Path:
    """``configs/toy/teacher.yaml`` -> ``logs/toy/teacher``; a YAML outside ``configs`` -> ``logs/<stem>``."""
    parts = config_path.with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts else parts[-1:]
    return Path("logs", *below)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
