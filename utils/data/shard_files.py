"""Files of a data set on disk: found in one order everywhere, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NUMBERED = re.compile(r"(.*)_(\d{5})_of_(\d{5})")


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


def whole(files: list[Path], path: Path) -> list[Path]:
    """The files found at `path`. Raises ValueError where they are numbered (`x_00003_of_00064`) and some are absent.

    A path to one file asks for that file alone.
    """
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.stem):
            numbers.setdefault((file.parent, match[1], int(match[3])), set()).add(int(match[2]))
    for (folder, stem, count), present in numbers.items():
        missing = sorted(set(range(count)) - present)
        if missing and path.is_dir():
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"data: {folder} lacks {len(missing)} of {count} files '{stem}_*' ({shown}): finish its preprocessing"
            )
    return files


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
