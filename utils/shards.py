"""Tensors in safetensors files, whole or in pieces, and the table that says which piece lies where.

A piece is a box of a tensor: ``offsets`` and ``sizes`` in each dimension. Its bytes have a CRC-32 in the table, checked
whenever the piece is read.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from utils.reading import reading

SUFFIX = ".safetensors"
# names of https://github.com/huggingface/safetensors, "Format"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Piece(NamedTuple):
    """A box of a tensor and the file that has it under the tensor's name; crc: CRC-32 of its bytes, None if unknown."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crc: int | None


class Entry(NamedTuple):
    """A tensor as it was saved. shape: the whole tensor's."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]


Table = dict[str, dict[str, Entry]]  # group -> tensor -> entry
Groups = Mapping[str, Mapping[str, Tensor]]  # group -> tensor; a group is a file, or one file of each rank


def is_finite(value: Tensor) -> bool:
    """Whether a tensor of real numbers has neither NaN nor infinity; nothing of its size is made."""
    if not value.numel():
        return True
    low, high = torch.aminmax(value.bfloat16() if value.element_size() == 1 else value)  # fp8 has no reductions
    return bool(torch.isfinite(low) and torch.isfinite(high))


class Damaged(ValueError):
    """A file is not what was written; the message begins with the file's path."""


# --------------------------------------------------------------------------------------------------------------- write


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write contiguous CPU tensors as one safetensors file, synced to disk. Returns the CRC-32 of each one's bytes.

    Raises OSError when it cannot be written, ValueError for a dtype that safetensors has no name for.
    """
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_stream(path, kinds, lambda names: (tensors[name] for name in names))


def write_stream(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[list[str]], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """As ``write_file``, but of each tensor only (dtype, shape) is known beforehand: ``read`` gives them one by one, in
    the order of the names that it gets, and no more than one is held."""
    # widest first, as the format's own writer does: every tensor is aligned to its element
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crcs: dict[str, int] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in zip(names, read(names), strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == kinds[name], name
            data = _bytes(tensor)
            crcs[name] = zlib.crc32(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return crcs


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in safetensors. Raises ValueError when it has none."""
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} cannot be saved: safetensors has {', '.join(_NAMES.values())}")
    return _NAMES[dtype]


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype of safetensors' name; None for one that torch, or this table, does not have."""
    return _DTYPES.get(name)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# --------------------------------------------------------------------------------------------------------------- table


def table_to_json(table: Table) -> dict[str, Any]:
    """As JSON holds it: {group: {tensor: [dtype, shape, [[file, offsets, sizes, crc], ...]]}}."""
    return {
        group: {
            name: [
                dtype_name(entry.dtype),
                entry.shape,
                [[piece.file, piece.offsets, piece.sizes, piece.crc] for piece in entry.pieces],
            ]
            for name, entry in entries.items()
        }
        for group, entries in table.items()
    }


def table_from_json(values: Mapping[str, Any]) -> Table:
    """The inverse of ``table_to_json``. Raises KeyError, TypeError or ValueError for anything else."""
    return {
        group: {
            name: Entry(_DTYPES[dtype], tuple(shape), [Piece(f, tuple(o), tuple(s), crc) for f, o, s, crc in pieces])
            for name, (dtype, shape, pieces) in entries.items()
        }
        for group, entries in values.items()
    }


def table_of_files(folder: Path, files: Iterable[str]) -> Table:
    """The table of files that hold whole tensors, from their headers: one group a file. Raises Damaged."""
    table: Table = {}
    for file in files:
        with _opened(folder / file) as handle:
            views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            table[file.removesuffix(SUFFIX)] = {
                name: Entry(
                    _DTYPES[view.get_dtype()],
                    tuple(view.get_shape()),
                    [Piece(file, (0,) * len(view.get_shape()), tuple(view.get_shape()), None)],
                )
                for name, view in views.items()
            }
    return table


def merged(parts: Iterable[Table]) -> Table:
    """One table of what several ranks wrote. Raises ValueError unless each tensor is whole, and written once."""
    out: Table = {}
    for part in parts:
        for group, entries in part.items():
            into = out.setdefault(group, {})
            for name, entry in entries.items():
                known = into.setdefault(name, Entry(entry.dtype, entry.shape, []))
                if known[:2] != entry[:2]:
                    raise ValueError(f"{group}/{name} is {entry[:2]} on one rank, {known[:2]} on another")
                known.pieces.extend(entry.pieces)
    for group, entries in out.items():
        for name, entry in entries.items():
            places = {piece.offsets for piece in entry.pieces}
            numbers = sum(math.prod(piece.sizes) for piece in entry.pieces)
            if numbers != math.prod(entry.shape) or (numbers and len(places) != len(entry.pieces)):
                raise ValueError(f"{group}/{name} {entry.shape} was written in pieces that are not the whole: {places}")
    return out


# ---------------------------------------------------------------------------------------------------------------- read


def read_pieces(folder: Path, wanted: Sequence[tuple[str, Entry, Piece]]) -> Iterator[tuple[int, Tensor]]:
    """(place in ``wanted``, the piece) of each (tensor, entry, piece), file by file: each file is opened once.

    The tensors are views of the mapped file: copy from them, do not keep them. Raises Damaged, naming the file.
    """
    by_file: dict[str, list[int]] = {}
    for place, (_, _, piece) in enumerate(wanted):
        by_file.setdefault(piece.file, []).append(place)
    for file, places in by_file.items():
        with _opened(folder / file) as handle:
            last: tuple[Piece, Tensor] | None = None
            for place in places:
                name, entry, piece = wanted[place]
                if last is None or last[0] is not piece:
                    last = piece, _checked(handle, folder / file, name, entry, piece)
                yield place, last[1]


def read_group(folder: Path, entries: Mapping[str, Entry], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Whole tensors on ``device``, put together from their pieces. Raises Damaged, naming the file."""
    out = {name: torch.empty(entry.shape, dtype=entry.dtype, device=device) for name, entry in entries.items()}
    wanted = [(name, entry, piece) for name, entry in entries.items() for piece in entry.pieces]
    for place, tensor in read_pieces(folder, wanted):
        name, _, piece = wanted[place]
        box = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
        out[name][box].copy_(tensor)
    return out


def _checked(handle: Any, path: Path, name: str, entry: Entry, piece: Piece) -> Tensor:
    tensor: Tensor = handle.get_tensor(name)
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != piece.sizes:
        raise Damaged(f"{path} is corrupt ({name} is {tensor.dtype} {tuple(tensor.shape)}, not what was saved)")
    if piece.crc is not None and zlib.crc32(_bytes(tensor)) != piece.crc:
        raise Damaged(f"{path} is corrupt (the checksum of {name} is another)")
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with reading("", path, "", says="is corrupt", error=Damaged), safe_open(path, framework="pt") as handle:
        yield handle
