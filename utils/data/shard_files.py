"""Files of a data set on disk: found in one order everywhere, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def found_files(path: Path, *suffixes: str) -> list[Path]:
    """The file itself, or all files with such a suffix under a folder, sorted; hidden ones are left out.

    Sorted by their names below the folder, so every machine numbers them alike. Raises ValueError if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"data: no such file or folder: {path}")
    found = [file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file()]
    shown = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not shown:
        raise ValueError(f"data: {path} holds no {', '.join(suffixes)} file")
    return sorted(shown, key=lambda file: file.relative_to(path).as_posix())


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A hidden neighbour to write to, which becomes `path` on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def arrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet). Raises ValueError, in one line, where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data: parquet files need pyarrow: pip install -r requirements.txt") from None
    return pyarrow, pyarrow.parquet
