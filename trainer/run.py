"""A run from its config to its end: what train.py does after the command line."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from configs.schema import RunConfig
from trainer.agreed import require_same_command
from trainer.base import RunOptions
from trainer.build import build_trainer
from trainer.notices import Notices, webhook_url
from utils import distributed
from utils.launcher import LauncherTimes, LauncherWatch
from utils.logging import setup_console, warn
from utils.parallel.mesh import split
from utils.run_lock import LockTimes, RunLock
from utils.watchdog import Watchdog

LOCK_TIMES = LockTimes()
LAUNCHER_TIMES = LauncherTimes()


def train(config: RunConfig, options: RunOptions) -> int:
    """Trains, or goes on, and returns the exit code: 0, or 128 + n after signal n, whose state was saved first.

    All ranks call it together. Raises UserError, also when they disagree on config, code, torch or mesh; LauncherGone
    when their launcher is gone, after the state was saved.
    """
    with LauncherWatch(LAUNCHER_TIMES):
        return _train(config, options)


def _train(config: RunConfig, options: RunOptions) -> int:
    url = webhook_url(config.logging)
    setup_console(distributed.rank(), distributed.world_size())
    warn(distributed.unused_gpus())
    split(config.parallel, distributed.world_size())  # refused before ranks wait for each other
    distributed.init(config.watchdog.group_timeout())
    notices = Notices(config.name, options.logdir, url if distributed.is_main() else None)
    with notices, Watchdog(config.watchdog):
        require_same_command(config, options)
        lock = RunLock(options.logdir, LOCK_TIMES) if options.save or options.log else None
        with lock or nullcontext():
            trainer = build_trainer(config, replace(options, notices=notices, lock=lock))
            try:
                return trainer.train()
            finally:
                if distributed.world_size() == 1:  # a save that was begun is part of what the lock is held for
                    trainer.saver.settle()
