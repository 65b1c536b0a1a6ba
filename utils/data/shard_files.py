"""Files of a data set on disk: found in one order everywhere."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from utils.absent import absent
from utils.limits import check_size

SMALL = 1 << 26  # bytes that any ratio may lead to
BATCH = 256  # rows that are read at a time
_NUMBERED = re.compile(r"(.*)_(\d{5})_of_(\d{5})")


def found_files(path: Path, *suffixes: str) -> list[Path]:
    """The file itself, or all files with such a suffix under a folder, sorted; hidden ones are left out.

    Sorted by their names below the folder, so every machine numbers them alike. Raises ValueError if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"data: no such file or folder: {path} {absent(path)}")
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


def check_group(metadata: Any, group: int, columns: Collection[str], where: str) -> None:
    """Looks at what a row group of a parquet file says of itself, before it is read. Raises UserError."""
    found = metadata.row_group(group)
    parts = [found.column(i) for i in range(found.num_columns)]
    wanted = [part for part in parts if part.path_in_schema.split(".")[0] in columns]
    whole, packed = sum(p.total_uncompressed_size for p in wanted), sum(p.total_compressed_size for p in wanted)
    check_size("rows", found.num_rows, where, unit="rows")
    check_size("row", whole, where)
    if whole > SMALL:
        check_size("ratio", whole // max(packed, 1), where, unit="bytes of each packed byte")


def column_values(file: Any, column: str, where: str) -> list[Any]:
    """A column of an opened parquet file, read in parts, as a few bytes may stand for many rows. Raises UserError."""
    out: list[Any] = []
    held = 0
    for group in range(file.metadata.num_row_groups):
        check_group(file.metadata, group, [column], where)
    for part in file.iter_batches(batch_size=BATCH, columns=[column]):
        held += part.nbytes
        check_size("text", held, where)
        check_size("rows", len(out), where, unit="rows")
        out += part.column(0).to_pylist()
    return out


def arrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet). Raises ValueError, in one line, where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data: parquet files need pyarrow: pip install -r requirements.txt") from None
    return pyarrow, pyarrow.parquet
