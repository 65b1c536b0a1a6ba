"""What a W&B run has been told already: by a record of its last step, and by W&B's own files in the run folder.

The record is written when a run has finished, for W&B writes on after that. A run that was killed has none, and W&B may
have lost some of what it was told.

W&B's file is 7 bytes of a header and then LevelDB's log format: blocks of 32 KiB with pieces of records, each piece
after its checksum (4 bytes), length (2) and place in its record (1: whole, first, middle or last). A record is W&B's
protobuf message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from utils.writing import write_text

_HEADER, _BLOCK, _PIECE = 7, 32 * 1024, struct.Struct("<IHB")
RECORD = "wandb_step.txt"
_PADDING, _WHOLE, _FIRST, _LAST = 0, 1, 2, 4


def keep_last(run_dir: Path, run_id: str, step: int) -> None:
    """Records the last step that a run was told. Raises Unwritten."""
    write_text(run_dir / RECORD, f"{run_id} {step}\n")


def last_step(run_dir: Path, run_id: str) -> int | None:
    """The last step that a run was told, None for none. Raises OSError, and what protobuf raises for a file of another
    format."""
    files = sorted(run_dir.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"))
    found = [step for file in files for step in steps(file)]
    if (record := run_dir / RECORD).is_file():
        whose, _, step = record.read_bytes().decode(errors="replace").strip().partition(" ")
        found += [int(step)] if whose == run_id and step.isdecimal() else []
    return max(found, default=None)


def steps(file: Path) -> Iterator[int]:
    """The step of each line of a file's history, in their order; a torn end is left out. Raises as `last_step`."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            yield record.history.step.num


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records; a torn one at the end is left out."""
    place, record = _HEADER, b""
    while place + _PIECE.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _PIECE.size:  # too little for a piece: zeros
            place += left
            continue
        _, size, kind = _PIECE.unpack_from(data, place)
        place += _PIECE.size
        if kind == _PADDING or place + size > len(data):
            return
        piece, place = data[place : place + size], place + size
        record = piece if kind in (_WHOLE, _FIRST) else record + piece
        if kind in (_WHOLE, _LAST):
            yield record
