"""What cannot be read of a run's small files is kept beside them: it stops no run."""

from __future__ import annotations

import logging
from pathlib import Path

console = logging.getLogger("fewstep")


def set_aside(path: Path, damaged: bytes) -> None:
    """Adds what cannot be read of `path` to a file beside it, and says so in one line. Raises OSError."""
    beside = path.with_name(f"{path.name}.damaged")
    with beside.open("ab") as file:
        file.write(damaged + b"\n")
    console.warning("%s was damaged: %d bytes were moved to %s; the run goes on", path, len(damaged), beside)
