"""Self-Forcing's and CausVid's LMDB folders, read only: ODE pairs, or clean latents, with their prompts.

Keys: `latents_shape` -> "N S F C H W" in text, `latents_{i}_data` -> fp16 bytes, `prompts_{i}_data` -> UTF-8, and with
a first frame `img_shape`, `img_{i}_data` -> uint8 [H, W, 3]. Noise levels are not stored: the reader names them.
"""

# N rows  S stored points, from noise to clean  F latent frames  C channels  H W size

from __future__ import annotations

import contextlib
import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from utils.data.stream import CorruptSample, Sample
from utils.data.tensors import finite, from_bytes
from utils.errors import UserError
from utils.fields import show
from utils.limits import check_size
from utils.reading import reading


class LMDBFolder:
    """One LMDB environment, or a folder of them (`shard_0`, `shard_1`, ...), opened read only and without locks.

    sigmas: the noise level of each stored point, the last one 0; needed where S > 1. Samples then have `trajectory`,
    and always its clean end as `latents`. Latents are normalised, as Self-Forcing stores them.

    Raises ValueError where lmdb is not installed, for a folder that holds no such environment, and for levels that do
    not fit what is stored.
    """

    def __init__(self, path: str | Path, sigmas: Sequence[float] | None = None) -> None:
        lmdb, self.path = _lmdb(), Path(path)
        self.folders = _environments(self.path)
        self.environments: list[Any] = []
        self.shapes_of: list[tuple[int, ...]] = []
        with contextlib.ExitStack() as stack:
            for folder in self.folders:
                with reading("data", folder, says="is no LMDB folder"):
                    check_whole(folder / "data.mdb")
                    found = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
                    stack.callback(found.close)
                    self.environments.append(found)
                    self.shapes_of.append(_shape(found, folder))
            self.shard_sizes = [shape[0] for shape in self.shapes_of]
            self._first = [0]
            for size in self.shard_sizes:
                self._first.append(self._first[-1] + size)
            self.sigmas = self._levels(sigmas)
            stack.pop_all()  # nothing was wrong: they stay open

    def read(self, item: int, position: int) -> Sample:
        """The row `item`, counted through all environments. Raises CorruptSample."""
        del position  # nothing is drawn
        shard = bisect_right(self._first, item) - 1
        row, shape = item - self._first[shard], self.shapes_of[shard]
        where = f"{self.folders[shard]}, row {row}"
        with reading("", where, "", error=CorruptSample):
            latents, prompt, image = self._values(shard, row, where)
            x = finite(from_bytes(latents, shape[1:], "float16", where).float(), where)
            x = x if x.ndim == 5 else x.unsqueeze(0)  # some are stored without the axis of points
            is_trajectory = x.shape[0] > 1
            return Sample(
                name=where,
                caption=prompt.decode(errors="replace"),
                latents=x[-1],
                pixels=self._first_frame(shard, image, where),
                trajectory=x if is_trajectory else None,
                sigmas=self.sigmas if is_trajectory else None,
            )

    def shapes(self) -> list[tuple[int, ...]]:
        """The latents' shape (F, C, H, W) of every row: to make buckets of."""
        return [shape[-4:] for shape in self.shapes_of for _ in range(shape[0])]

    def captions(self) -> list[str]:
        """The prompt of every row, empty where it has none."""
        out: list[str] = []
        for folder, environment, size in zip(self.folders, self.environments, self.shard_sizes, strict=True):
            # of gigabytes of latents none is touched
            with reading("data", folder), environment.begin() as view:
                found = (view.get(f"prompts_{row}_data".encode()) for row in range(size))
                out += [(prompt or b"").decode(errors="replace") for prompt in found]
        return out

    def close(self) -> None:
        """Closes the environments."""
        for environment in self.environments:
            environment.close()

    def _values(self, shard: int, row: int, where: str) -> tuple[bytes, bytes, bytes | None]:
        with self.environments[shard].begin() as view:
            latents = view.get(f"latents_{row}_data".encode())
            prompt = view.get(f"prompts_{row}_data".encode())
            image = view.get(f"img_{row}_data".encode())
        if latents is None or prompt is None:
            raise CorruptSample(f"{where} has no {'latents' if latents is None else 'prompt'}")
        return latents, prompt, image

    def _first_frame(self, shard: int, image: bytes | None, where: str) -> Tensor | None:
        """The first frame as pixels [1, 3, H, W] in [0, 1]."""
        if image is None:
            return None
        with self.environments[shard].begin() as view:
            text = view.get(b"img_shape")
        if text is None:
            raise CorruptSample(f"{where} has an image and its folder has no img_shape")
        shape = tuple(map(int, text.decode().split()))[1:]
        return from_bytes(image, shape, "uint8", f"{where}: img").permute(2, 0, 1)[None].float() / 255

    def _levels(self, sigmas: Sequence[float] | None) -> Tensor | None:
        points = {shape[1] if len(shape) == 6 else 1 for shape in self.shapes_of}
        if len(points) > 1:
            raise ValueError(
                f"data: {self.path} holds trajectories of {sorted(points)} points: give one folder for each"
            )
        count = points.pop()
        if count == 1:
            return None
        if sigmas is None or len(sigmas) != count or sigmas[-1] != 0 or list(sigmas) != sorted(sigmas, reverse=True):
            raise ValueError(
                f"data: {self.path} holds trajectories of {count} points and not their noise levels: give "
                f"{count} sigmas, falling, the last one 0; got {None if sigmas is None else list(sigmas)}"
            )
        return torch.tensor(sigmas)


def _environments(path: Path) -> list[Path]:
    if (path / "data.mdb").is_file():
        return [path]
    found = sorted(file.parent for file in path.glob("*/data.mdb"))
    if not found:
        raise ValueError(f"data: {path} holds no LMDB environment (no data.mdb in it or one folder below)")
    return found


def _shape(environment: Any, folder: Path) -> tuple[int, ...]:
    with environment.begin() as view:
        text = view.get(b"latents_shape")
    says = "has no readable key 'latents_shape'"
    with reading("data", folder, "it is not one of Self-Forcing's", says=says):
        shape = tuple(map(int, text.decode().split()))
    if len(shape) not in (5, 6) or min(shape) < 1:
        raise UserError(f"data: {folder}: latents must be N [S] F C H W, got {show(list(shape))}")
    rows, each = shape[0], 2 * math.prod(shape[1:])  # bytes of fp16
    check_size("rows", rows, f"data: {folder}", unit="rows")
    entries, size = environment.stat()["entries"], (folder / "data.mdb").stat().st_size
    if rows > entries or each > size:
        raise UserError(
            f"data: {folder} says that it has {rows} rows of {each} bytes, and holds {entries} values in {size} bytes: "
            "it is damaged: fetch it or make it again"
        )
    return shape


def check_whole(file: Path) -> None:
    """Raises UserError for a data.mdb that is shorter than its newest meta page says: to read it would end the process
    by a signal, for LMDB maps it. Other errors for what is no such file."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        page = _meta(opened, 0).page
        newest = max(_meta(opened, 0), _meta(opened, page))
    if (needed := (newest.last + 1) * page) > size:
        raise UserError(f"data: {file} is cut short: {size} bytes of {needed}: fetch it or make it again")


class _Meta(NamedTuple):
    """Of a meta page (lmdb's mdb.c, MDB_meta): number of the transaction, of the last page, bytes of a page."""

    transaction: int
    last: int
    page: int


def _meta(file: BinaryIO, place: int) -> _Meta:
    """The meta page that begins at this byte: a head of 16 bytes, magic and version, an address, the map's size, two
    tables of 48 bytes, of which the first begins with the size of a page. Raises ValueError or struct.error."""
    file.seek(place + 16)
    magic, _, _, _, page, _, last, transaction = struct.unpack("<IIQQI92sQQ", file.read(136))
    if magic != 0xBEEFC0DE or not 512 <= page <= 65536:
        raise ValueError(f"its meta page begins with {magic:#x}, and its pages have {page} bytes")
    return _Meta(transaction, last, page)


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError:
        raise ValueError("data: LMDB folders need the package lmdb: pip install lmdb") from None
    return lmdb
