"""`torchrun train.py --config_path configs/... [key=value ...]`: trains or distils what the YAML describes."""

from __future__ import annotations

import os

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from configs.load import load_run
from planning.launch import Recipe, cluster_of
from planning.report import plan_text
from trainer.base import RunOptions
from trainer.command import train_args
from trainer.run import train
from utils import distributed
from utils.cli import run_cli
from utils.config import to_yaml


def main() -> int:
    args = train_args()
    config = load_run(args.config_path, args.overrides)
    if args.print_config:
        if distributed.is_main():
            print(to_yaml(config), end="")
        return 0
    if args.plan is not None:
        print(plan_text(config, cluster_of(Recipe(args.config_path), config, args.plan), args.max_steps))
        return 0
    options = RunOptions(args.logdir, args.resume, args.max_steps, args.wandb, args.save, args.visualize)
    return train(config, options)


if __name__ == "__main__":
    run_cli(main)
