"""Prompt files, and the endless shuffled order in which a training run reads them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from utils.data.shard_files import arrow, column_values, found_files, whole
from utils.data.text_files import csv_table, text_lines
from utils.errors import UserError
from utils.fields import show
from utils.limits import check_size
from utils.random import generator
from utils.reading import UTF8, reading

_COLUMNS = ("prompt", "caption")


def load_prompts(path: str | Path, encoding: str = UTF8) -> list[str]:
    """Prompts of a .txt (one a line), .csv, .jsonl or .parquet file (field `prompt` or `caption`), in order, or of all
    .parquet files under a folder, in the order of their names. Blank ones are skipped.

    encoding: of a text file.

    Raises ValueError if there is no such file, or one of another kind, without such a field, or that holds no prompt.
    """
    path = Path(path)
    files = whole(found_files(path, ".parquet"), path) if path.is_dir() else [path]
    prompts: list[str] = []
    held = 0
    for file in files:
        prompts += (part := _file_prompts(file, encoding))
        held += sum(map(len, part))
        check_size("text", held, f"prompts: {path}")
    if not prompts:
        raise ValueError(f"prompts: {path} holds no prompt; write at least one")
    return prompts


def _file_prompts(path: Path, encoding: str) -> list[str]:
    texts = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix not in (*texts, ".parquet"):
        raise ValueError(
            f"prompts: cannot read {path}; give a {', '.join(texts)}, .parquet file, or a folder of .parquet files"
        )
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path}")
    with reading("prompts", path):
        found = _read_parquet(path) if path.suffix == ".parquet" else texts[path.suffix](path, encoding)
        prompts = [prompt.strip() for prompt in found if prompt.strip()]
        longest = max((len(prompt.encode()) for prompt in prompts), default=0)  # refuses what UTF-8 cannot hold, too
        check_size("line", longest, f"prompts: a prompt of {path}")
    return prompts


def _read_txt(path: Path, encoding: str) -> list[str]:
    return text_lines("prompts", path, encoding)


def _read_csv(path: Path, encoding: str) -> list[str]:
    found, rows = csv_table("prompts", path, encoding)
    column = next((name for name in _COLUMNS if name in found), None)
    if column is None:
        raise UserError(f"prompts: {path} needs a column 'prompt' or 'caption', it has {show(found)}")
    return [row[column] for row in rows]


def _read_jsonl(path: Path, encoding: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text_lines("prompts", path, encoding), start=1):
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
