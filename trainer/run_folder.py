"""What a run leaves in its folder, and how it is put out of the next one's way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.schema import RunConfig
from utils import distributed
from utils.config import save
from utils.logging import console
from utils.writing import Unwritten, writing

LOGS = ("metrics.jsonl", "wandb_id.txt", "wandb_step.txt")
RUN_FILES = (
    "checkpoints",
    "config.yaml",
    "validation",
    "tensorboard",
    "wandb",
    *LOGS,
    *(f"{name}.damaged" for name in LOGS),
)


def keep_config(config: RunConfig, logdir: Path) -> None:
    """The config as it is, beside what comes of it. A run goes on without, for its checkpoints have it too."""
    if not distributed.is_main():
        return
    try:
        save(config, logdir / "config.yaml")
    except Unwritten as refused:
        console.warning("%s: the run goes on without it", refused)


def set_aside(logdir: Path, paths: Sequence[Path]) -> None:
    """Moves what an earlier run left in this folder to `previous_N`: nothing resumes from it, nothing is lost."""
    present = [path for path in paths if path.exists()]
    if distributed.is_main() and present:
        number = 1
        while (logdir / f"previous_{number}").exists():
            number += 1
        with writing("--logdir", logdir):
            for path in present:
                target = logdir / f"previous_{number}" / path.relative_to(logdir)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        console.warning("%d files or folders of an earlier run were moved to %s", len(present), target.parent)
    distributed.barrier()
