"""How long a disk lasts for a run's saves and logs."""

from __future__ import annotations

import contextlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

SAVES, HOURS = 2, 24.0  # a disk that lasts for more of both is not short


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be made."""
    for there_is in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(there_is).free
    return shutil.disk_usage(Path.cwd()).free


@dataclass(frozen=True)
class Saves:
    """How a run's saves take up room.

    size: bytes of one.
    stored: how many lie there that will be deleted in time.
    keep_last: how many of those are kept; None deletes none.
    for_good: share of all saves that is never deleted.
    logs: bytes of metrics, videos and the like from one save to the next.
    """

    size: int
    stored: int
    keep_last: int | None
    for_good: float = 0.0
    logs: float = 0.0

    def fitting(self, free: int) -> float:
        """How many more saves fit into `free` bytes; infinity where deletion makes room for all further ones.

        An old save is deleted once the new one is there, so a disk holds `keep_last + 1` of them for a while.
        """
        if free < self.size:
            return 0
        each = self.size + self.logs
        growing = math.inf if self.keep_last is None else max(self.keep_last - self.stored, 0)
        if growing and (free - self.size) // each + 1 <= growing:
            return (free - self.size) // each + 1
        left = free - growing * each  # from here on each save makes another one go
        if left < self.size:
            return growing
        lasting = self.for_good * self.size + self.logs
        return growing + ((left - self.size) // lasting + 1 if lasting else math.inf)


def share_for_good(every: int, keep_every: int | None) -> float:
    """Share of the saves after each `every` steps that `keep_every` keeps: those whose step divides by it."""
    return 0.0 if keep_every is None else every / math.lcm(every, keep_every)


def shortage(saves: Saves, free: int, *, to_come: int, hours: float | None) -> str | None:
    """What to say of a disk that is short, in one line; None for one that lasts.

    to_come: saves until the run's end, the one that begins now with them.
    hours: from one save to the next; None before the run, when a disk is short that does not last to its end.
    """
    fits = saves.fitting(free)
    if fits >= to_come or (hours is not None and fits >= SAVES and fits * hours >= HOURS):
        return None
    if fits == 0:
        lasts = f"a save of {size_text(saves.size)} does not fit"
    else:
        lasts = f"room for {fits:.0f} more save{'s' * (fits != 1)} of {size_text(saves.size)}"
        lasts += f" (of {to_come} to come){'' if hours is None else f': it lasts {fits * hours:.1f} hours'}"
    return f"{size_text(free)} free, {lasts}"


def size_text(count: float) -> str:
    """As "1.2 GB", "340.0 MB" or "12.0 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"
