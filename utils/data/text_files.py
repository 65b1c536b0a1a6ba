"""Lines and tables of text files: only \\n and \\r\\n end a line, whatever else Unicode calls a separator."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.limits import limits
from utils.reading import UTF8, read_text


def text_lines(what: str, path: Path, encoding: str = UTF8) -> list[str]:
    """Raises UserError, also for a file whose lines end by \\r alone."""
    text = read_text(what, path, encoding=encoding)
    if "\r" in text.strip() and "\n" not in text:
        raise UserError(f"{what}: {path} ends its lines by \\r alone: end them by \\n")
    return text.split("\n")


def csv_table(what: str, path: Path, encoding: str = UTF8) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the columns, and the rows by them; a cell that is absent is empty.

    Raises UserError, with its line, for a quote that is not closed and for a row of more cells than columns.
    """
    text = read_text(what, path, encoding=encoding)
    csv.field_size_limit(min(limits().text, sys.maxsize))  # no cell is longer than its file
    names: list[str] = []
    rows = []
    for line, cells in _csv_rows(text, f"{what}: {path}"):
        if not names:
            names = cells
            continue
        if any(cells[len(names) :]):
            raise UserError(
                f"{what}: {path}, line {line} has {len(cells)} cells and the table {len(names)} columns: put a text "
                'with commas between quotes (")'
            )
        rows.append(dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=False)))
    return names, rows


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line that it begins in. Raises UserError."""
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            if "new-line" in str(problem):
                said = "has a \\r outside of quotes: end lines by \\n"
            else:
                said = (
                    f'begins a row with a quote (") that is not closed, or that more text follows (found in line '
                    f'{reader.line_num}): close it, and write "" for a quote within a text'
                )
            raise UserError(f"{where}, line {line} {said}") from None
        if cells is None:
            return
        if cells:
            yield line, cells
