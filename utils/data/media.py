"""Which videos or images a data set holds, and their captions: a folder, webdataset tar shards, or a table of files.

Captions: `a.mp4` beside `a.txt` (the text) or `a.json` (field `caption`, `prompt` or `text`), in a folder as in a tar;
or a .csv, .jsonl, .json or .parquet table that names files. Nothing is read but names until a sample is asked for.
Where nothing has a caption all captions are empty; where only some lack one, those samples are corrupt.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from utils.data.shard_files import arrow, column_values, found_files
from utils.data.stream import CorruptSample
from utils.data.text_files import csv_table, text_lines
from utils.errors import UserError
from utils.fields import show
from utils.limits import check_size
from utils.logging import warn
from utils.reading import decoded, read_text, reading

VIDEOS: Final = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".gif")
IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FILE_COLUMNS: Final = ("file", "file_name", "filename", "path", "video", "video_path", "image", "image_path")
CAPTION_COLUMNS: Final = ("caption", "prompt", "text", "cap")


@dataclass(frozen=True)
class Part:
    """Bytes of a file: all of it (size None), or those of a member of a tar; of one with holes (size -1) none."""

    path: Path
    offset: int = 0
    size: int | None = None

    def open(self) -> BinaryIO:
        """As a file. Raises OSError, and CorruptSample for a member of more bytes than `Limits.media`."""
        if self.size is None:
            return self.path.open("rb")
        return io.BytesIO(self.read())

    def read(self, limit: str = "media") -> bytes:
        """Its bytes. Raises OSError, also where the file is shorter, and CorruptSample for more than `limit` of them,
        which is the name of one of `Limits`."""
        available = self.path.stat().st_size
        size = available if self.size is None else self.size
        if size < 0:
            raise OSError("a member with holes: pack it without --sparse")
        if self.offset + size > available:
            raise OSError(f"{self.path} ends within a member")
        check_size(limit, size, self.path, error=CorruptSample)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(size)


@dataclass(frozen=True)
class Media:
    """One video or image. caption: its text, or where to read it (a sidecar), or None where it has none."""

    name: str
    part: Part
    caption: str | tuple[Part, str] | None

    def text(self) -> str:
        """The caption. Raises CorruptSample where it has none, or its sidecar cannot be read."""
        if isinstance(self.caption, str):
            return self.caption
        if self.caption is None:
            raise CorruptSample(f"{self.name} has no caption: no .txt and no .json beside it")
        part, suffix = self.caption
        with reading("", f"{self.name}: its caption ({suffix})", "", error=CorruptSample):
            text = decoded(part.read("line"), f"{self.name}: its caption ({suffix}) cannot be read")
            found = text if suffix == ".txt" else caption_of(json.loads(text))
            (found or "").encode()  # JSON may hold what UTF-8 cannot
        if not found or not found.strip():
            raise CorruptSample(f"{self.name}: its caption ({suffix}) is empty, or has no field 'caption' or 'prompt'")
        return " ".join(found.split())


def find_media(
    path: str | Path, suffixes: Iterable[str] = VIDEOS, captions: str | Path | None = None
) -> list[list[Media]]:
    """The media of a data set by shard, in one order on every machine: a tar is a shard, a folder or table is one.

    path: a folder of files, a tar or a folder of tars, or with `captions` what the table's file names are relative to.
    Raises ValueError where there is nothing, for a damaged tar, and for a table without the columns.
    """
    path, kinds = Path(path), tuple(suffixes)
    if captions is not None:
        return [_of_table(Path(captions), path)]
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        shards = [_of_tar(tar, kinds) for tar in found_files(path, ".tar")]
    else:
        shards = [_of_folder(path, kinds)]
    if not any(shards):
        raise ValueError(f"data: {path} holds no {', '.join(kinds)} in its tar files")
    media = [file for shard in shards for file in shard]
    if all(file.caption is None for file in media):
        warn(f"{path}: none of {len(media)} files has a caption: all captions are empty")
        return [[replace(file, caption="") for file in shard] for shard in shards]
    return shards


def caption_of(row: Any) -> str | None:
    """The caption in a row of a table or a sidecar's JSON; of several (FastVideo's `cap`) the first."""
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return None
    value = next((row[name] for name in CAPTION_COLUMNS if row.get(name)), None)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else None


def _of_folder(path: Path, suffixes: tuple[str, ...]) -> list[Media]:
    files = found_files(path, *suffixes)
    around = path.rglob("*") if path.is_dir() else path.parent.glob("*")
    sidecars = {file for file in around if file.suffix in (".txt", ".json")}
    out = []
    for file in files:
        beside = [(suffix, file.with_suffix(suffix)) for suffix in (".txt", ".json")]
        caption = next(((Part(sidecar), suffix) for suffix, sidecar in beside if sidecar in sidecars), None)
        out.append(Media(str(file), Part(file), caption))
    return out


def _of_tar(path: Path, suffixes: tuple[str, ...]) -> list[Media]:
    """The members of a tar, grouped as webdataset does: one sample is what shares a name up to its first dot."""
    groups: dict[str, dict[str, Part]] = {}
    remedy = "fetch or pack it again"
    with reading("data", path, remedy, says="is damaged, or no uncompressed tar"), tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if member.isfile() and dot and stem:
                key = f"{folder}/{stem}" if folder else stem
                size = -1 if member.issparse() else member.size
                groups.setdefault(key, {})[f".{extension.lower()}"] = Part(path, member.offset_data, size)
    out = []
    for key, parts in groups.items():
        media = next((suffix for suffix in parts if suffix in suffixes), None)
        if media is not None:
            caption = next(((parts[suffix], suffix) for suffix in (".txt", ".json") if suffix in parts), None)
            out.append(Media(f"{path}:{key}{media}", parts[media], caption))
    return out


def _of_table(table: Path, root: Path) -> list[Media]:
    with reading("data: cannot read the table of captions", table, "mend it", says="is not one"):
        rows, out = list(_rows(table)), []
    has_captions = any(caption_of(row) is not None for row in rows)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"data: {table}, row {number} is no table of fields but {show(row)}")
        file = next((row[name] for name in FILE_COLUMNS if row.get(name)), None)
        caption = caption_of(row) if has_captions else ""
        if file is None or caption is None:
            raise ValueError(
                f"data: {table}, row {number} needs a file (column {', '.join(FILE_COLUMNS[:4])}, ...) and a caption "
                f"({', '.join(CAPTION_COLUMNS[:2])}, ...), it has {sorted(map(str, row))}"
            )
        path = root / str(file)
        out.append(Media(str(path), Part(path), " ".join(caption.split())))
    if not out:
        raise ValueError(f"data: {table} names no file")
    return out


def _rows(table: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a table. Raises ValueError for a file that is absent, of another kind or not readable."""
    if not table.is_file():
        raise UserError(f"data: no such table of captions: {table}")
    if table.suffix == ".csv":
        yield from csv_table("data", table)[1]
    elif table.suffix == ".jsonl":
        yield from (json.loads(line) for line in text_lines("data", table) if line.strip())
    elif table.suffix == ".json":
        yield from json.loads(read_text("data", table))
    elif table.suffix == ".parquet":
        yield from _parquet_rows(table)
    else:
        raise UserError(f"data: {table} is no table of captions: give a .csv, .jsonl, .json or .parquet file")


def _parquet_rows(table: Path) -> Iterator[Mapping[str, Any]]:
    """The columns that name files and captions."""
    with arrow()[1].ParquetFile(table) as file:
        names = [name for name in (*FILE_COLUMNS, *CAPTION_COLUMNS) if name in file.schema_arrow.names]
        columns = [column_values(file, name, f"data: {table}") for name in names]
    yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
