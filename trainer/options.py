"""What a command line says of a run beside its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.notices import Notices
from trainer.observer import TrainerObserver
from utils.parallel.mesh import Mesh
from utils.run_lock import RunLock


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the config. `log`, `mesh` and `observer` are for a planner, whose run writes
    nothing, whose processes are pretended, and who wants to know where the trainer is.

    mesh: None takes the mesh of the processes that run.
    notices: whom the run tells of its validations and its end; None for nobody.
    lock: on the run's folder; None where nobody holds one.
    """

    logdir: Path
    resume: str = "auto"
    max_steps: int | None = None
    wandb: bool = True
    save: bool = True
    visualize: bool = True
    log: bool = True
    mesh: Mesh | None = None
    observer: TrainerObserver = TrainerObserver()
    notices: Notices | None = None
    lock: RunLock | None = None
