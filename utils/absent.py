"""What is said of a path that is not there: that it does not exist, and what lies where it was looked for."""

from __future__ import annotations

import difflib
from pathlib import Path

SHOWN = 4


def absent(path: Path) -> str:
    """As "does not exist (did you mean 'logs/ode_init'?)", or what the last folder on the way holds."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    name = path.relative_to(folder).parts[0] if folder in path.parents else path.name
    found = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if near := difflib.get_close_matches(name, found, n=1):
        return f"does not exist (did you mean '{folder / near[0]}'?)"
    held = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "") or "nothing"
    return f"does not exist ('{folder}' holds {held})"
