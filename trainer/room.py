"""Whether a run's disk lasts, looked at before the run and before each save."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from configs.sections import CheckpointConfig
from trainer.networks import Trained
from trainer.progress import Extent
from trainer.run_folder import RUN_FILES
from trainer.state import Tensors, save_run
from trainer.zero import portable
from utils import checkpoint, distributed
from utils.logging import warn
from utils.space import Saves, free_space, share_for_good, shortage

LOGS = [name for name in RUN_FILES if name != "checkpoints"]
REMEDY = "free some space there, or keep fewer (checkpoint.keep_last, checkpoint.keep_every)"


def bytes_of(tensors: Tensors) -> int:
    """Bytes of what is saved, over all ranks together."""
    return sum(tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values())


def save_bytes(trained: Mapping[str, Trained]) -> int:
    """Bytes of a checkpoint of these networks, before their first update too. All ranks call it."""
    networks = portable(dict(trained), values=False)
    size = bytes_of(save_run(networks)[0])
    fresh = [network.optimizer for network in networks.values() if network.optimizer.updates == 0]
    return size + sum(optimizer.state_bytes() for optimizer in fresh)


class Room:
    """What a run's folder takes, and how fast.

    folder: of the run.
    cadence: when it is saved.
    begins: iterations that were done before.
    total: iterations in all.
    free: bytes that are free where a folder is; None asks the disk.
    clock: seconds that only grow.
    """

    def __init__(
        self,
        folder: Path,
        cadence: CheckpointConfig,
        begins: int,
        total: int,
        *,
        free: Callable[[Path], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.cadence, self.begins, self.total = folder, cadence, begins, total
        self._free, self._clock = free or free_space, clock
        self._began, self._logs = clock(), _size(folder)

    def before_run(self, size: int) -> str | None:
        """What to warn of where the disk does not last to the run's end. size: of a checkpoint."""
        return self._warning(size, self.begins // self.cadence.every + 1, 0.0, None)

    def before_save(self, step: int, size: int) -> str | None:
        """What to warn of before iteration `step` is saved, in one line, where the disk is short."""
        every, done = self.cadence.every, max(step - self.begins, 1)
        hours = (self._clock() - self._began) / done * every / 3600
        logs = max(_size(self.folder) - self._logs, 0) / done * every
        return self._warning(size, -(-step // every), logs, hours)

    def _warning(self, size: int, number: int, logs: float, hours: float | None) -> str | None:
        """number: of the save that comes next, from 1."""
        cadence, last = self.cadence, -(-self.total // self.cadence.every)
        stored = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(self.folder / "checkpoints")]
        passing = [step for step in stored if cadence.keep_every is None or step % cadence.keep_every]
        for_good = share_for_good(cadence.every, cadence.keep_every)
        saves = Saves(size, len(passing), cadence.keep_last, for_good, logs)
        short = shortage(saves, self._free(self.folder / "checkpoints"), to_come=max(last - number + 1, 1), hours=hours)
        return None if short is None else f"{self.folder}: {short}: {REMEDY}"


def room_for(trained: Mapping[str, Trained], extent: Extent) -> Room | None:
    """On rank 0 the room of a run that is saved, None on others; warns where it is short. All ranks call it."""
    size = save_bytes(trained)
    if not distributed.is_main():
        return None
    room = Room(extent.folder, extent.config.checkpoint, extent.begins, extent.total)
    warn(room.before_run(size))
    return room


def _size(folder: Path) -> int:
    """Bytes of a run's logs; what vanishes meanwhile has none."""
    total = 0
    for name in LOGS:
        path = folder / name
        files = [Path(root, file) for root, _, names in os.walk(path) for file in names] if path.is_dir() else [path]
        for file in files:
            try:
                total += file.stat().st_size
            except OSError:
                continue
    return total
