"""`torchrun train.py --config_path configs/... [key=value ...]`: trains or distils what the YAML describes."""

from __future__ import annotations

import os
from pathlib import Path

from configs.load import load_run

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from planning.report import plan_text
from trainer.base import RunOptions
from trainer.build import build_trainer
from trainer.command import train_args
from utils import distributed
from utils.agreement import code_revision, require_agreement
from utils.cli import run_cli
from utils.config import config_hash, to_yaml
from utils.logging import setup_console
from utils.parallel.mesh import split
from utils.watchdog import Watchdog


def main() -> int:
    args = train_args()
    config = load_run(args.config_path, args.overrides)
    if args.print_config:
        if distributed.is_main():
            print(to_yaml(config), end="")
        return 0
    if args.plan is not None:
        print(plan_text(config, args.plan, args.max_steps))
        return 0
    setup_console(distributed.rank(), distributed.world_size())
    options = RunOptions(args.logdir, args.resume, args.max_steps, args.wandb, args.save, args.visualize)
    distributed.init(config.watchdog.group_timeout())
    with Watchdog(config.watchdog):
        require_agreement(
            {
                "config": config_hash(config)[:12],
                "code": code_revision(Path(__file__).parent),
                "torch": torch.__version__,
                "mesh": "replicate {} x shard {} x sequence {}".format(
                    *split(config.parallel, distributed.world_size())
                ),
            }
        )
        return build_trainer(config, options).train()


if __name__ == "__main__":
    run_cli(main)
