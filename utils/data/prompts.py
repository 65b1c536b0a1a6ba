"""Prompt files, and the endless shuffled order in which a training run reads them."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path

import torch

from utils.data.shard_files import arrow, column_values
from utils.errors import UserError
from utils.fields import show
from utils.limits import check_size
from utils.random import generator
from utils.reading import read_text, reading

_COLUMNS = ("prompt", "caption")


def load_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt (one a line), .csv, .jsonl or .parquet file (field `prompt` or `caption`), in order.

    Blank ones are skipped.

    Raises ValueError if the file is absent, of another kind, without such a field, or holds no prompt.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"prompts: cannot read {path}; give a {', '.join(readers)} file")
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path}")
    with reading("prompts", path):
        prompts = [prompt.strip() for prompt in readers[path.suffix](path) if prompt.strip()]
        longest = max((len(prompt.encode()) for prompt in prompts), default=0)  # refuses what UTF-8 cannot hold, too
        check_size("line", longest, f"prompts: a prompt of {path}")
    if not prompts:
        raise ValueError(f"prompts: {path} holds no prompt; write at least one")
    return prompts


def _read_txt(path: Path) -> list[str]:
    return read_text("prompts", path).splitlines()


def _read_csv(path: Path) -> list[str]:
    reader = csv.DictReader(io.StringIO(read_text("prompts", path), newline=""))
    found = list(reader.fieldnames or [])
    column = next((name for name in _COLUMNS if name in found), None)
    if column is None:
        raise UserError(f"prompts: {path} needs a column 'prompt' or 'caption', it has {show(found)}")
    return [row[column] or "" for row in reader]


def _read_jsonl(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(read_text("prompts", path).splitlines(), start=1):
        if not line.strip():
            continue
        with reading("prompts", f"{path}, line {number}", "", says="is not JSON"):
            row = json.loads(line)
        value = next((row[name] for name in _COLUMNS if name in row), None) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise UserError(f"prompts: {path}, line {number} needs a text field 'prompt' or 'caption'")
        prompts.append(value)
    return prompts


def _read_parquet(path: Path) -> list[str]:
    _, pq = arrow()
    with reading("prompts", path, says="is no parquet file"), pq.ParquetFile(path) as file:
        found = list(file.schema_arrow.names)
        column = next((name for name in _COLUMNS if name in found), None)
        if column is None:
            raise UserError(f"prompts: {path} needs a column 'prompt' or 'caption', it has {show(found)}")
        values = column_values(file, column, f"prompts: {path}")
    wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if wrong is not None:
        raise UserError(f"prompts: {path}, column '{column}' holds {show(wrong)}, which is no text")
    return [value or "" for value in values]


class PromptStream:
    """An endless order over `size` items, reshuffled every epoch, with no state: position p holds
    permutation(seed, p // size)[p % size].

    So a checkpoint keeps one integer (the position), ranks slice one global batch, and a run at another world size
    reads the same items. Raises ValueError if size < 1.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"prompt stream: needs at least one item, got {size}")
        self.size = size
        self.seed = seed

    def indices(self, cursor: int, count: int) -> list[int]:
        """The `count` items at positions cursor, cursor + 1, ... Raises ValueError on a negative argument."""
        if cursor < 0 or count < 0:
            raise ValueError(f"prompt stream: cursor and count must be >= 0, got {cursor} and {count}")
        places = (divmod(position, self.size) for position in range(cursor, cursor + count))
        return [_permutation(self.size, self.seed, epoch)[place] for epoch, place in places]


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(size, generator=generator(seed, "prompt order", epoch)).tolist()
