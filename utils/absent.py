"""What is said of a path that is not there: that it does not exist, and what lies where it was looked for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from utils.fields import short_list

SHOWN = 4


def absent(path: Path, suffixes: Sequence[str] = ()) -> str:
    """As "does not exist (did you mean 'logs/ode_init'?)", or what the last folder on the way holds.

    suffixes: which files could have been meant, such as ".yaml"; none for all.
    """
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    name = path.relative_to(folder).parts[0] if folder in path.parents else path.name
    meant = suffixes if folder == path.parent else ()
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    found = sorted(entry.name for entry in entries if not meant or entry.suffix in meant)
    if near := difflib.get_close_matches(name, found, n=1):
        return f"does not exist (did you mean '{folder / near[0]}'?)"
    held = short_list(found, SHOWN) or f"no {' or '.join(meant) or 'file'}"
    return f"does not exist ('{folder}' holds {held})"
