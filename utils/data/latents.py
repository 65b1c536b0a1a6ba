"""A folder of latents or trajectories of any format, and the order to read it in: one shape a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from utils.absent import absent
from utils.data.lmdb_store import LMDBFolder
from utils.data.order import BucketOrder, Order, ShardedOrder
from utils.data.parquet import ParquetFolder
from utils.data.safetensors_shards import SafetensorsFolder
from utils.data.stream import Sample
from utils.data.tensors import Statistics


class LatentSource(Protocol):
    """A `Source` that knows the latents' shape (F, C, H, W) and the caption of every item without reading it."""

    shard_sizes: list[int]

    def read(self, item: int, position: int) -> Sample: ...

    def shapes(self) -> list[tuple[int, ...]]: ...

    def captions(self) -> list[str]: ...


def open_latents(
    path: str | Path, *, statistics: Statistics | None = None, sigmas: Sequence[float] | None = None
) -> LatentSource:
    """The reader for the files of a folder: parquet files (ours and FastVideo's), safetensors shards, or LMDB folders.

    statistics: of the VAE, for raw latents. sigmas: the noise levels of an LMDB's trajectories. Raises ValueError, in
    one line, for a folder of none of them, of two of them, or that its reader refuses.
    """
    path = Path(path)
    found = {
        "parquet": path.suffix == ".parquet" or any(path.rglob("*.parquet")),
        "safetensors": path.suffix == ".safetensors" or any(path.rglob("*.safetensors")),
        "LMDB": (path / "data.mdb").is_file() or any(path.glob("*/data.mdb")),
    }
    kinds = [kind for kind, is_there in found.items() if is_there]
    if not path.exists():
        raise ValueError(f"data: {path} {absent(path)}")
    if len(kinds) != 1:
        held = f"holds {' and '.join(kinds)} files" if kinds else "holds no .parquet, .safetensors or data.mdb"
        raise ValueError(f"data: {path} {held}: give a folder of one kind of latents")
    if sigmas is not None and not found["LMDB"]:
        raise ValueError(f"data: {path} stores its own noise levels: leave sigmas out")
    if found["parquet"]:
        return ParquetFolder(path, statistics)
    return SafetensorsFolder(path, statistics) if found["safetensors"] else LMDBFolder(path, sigmas)


def order_of_shape(source: LatentSource, shape: tuple[int, ...], seed: int) -> Order:
    """A shuffled order of the items of one shape. Raises ValueError where there is none."""
    shapes = source.shapes()
    if set(shapes) == {shape}:
        return ShardedOrder(source.shard_sizes, seed)
    ends = list(itertools.accumulate(source.shard_sizes, initial=0))
    shards = [[item for item in range(*span) if shapes[item] == shape] for span in itertools.pairwise(ends)]
    return BucketOrder([shards], 1, seed)


def latent_order(source: LatentSource, batch: int, seed: int, pool: int | None = None) -> Order:
    """An order in which `batch` positions in a row have one shape: plain where the data has only one."""
    shapes = source.shapes()
    kinds = sorted(set(shapes))
    if len(kinds) == 1:
        return ShardedOrder(source.shard_sizes, seed, pool)
    buckets: list[list[list[int]]] = [[[] for _ in source.shard_sizes] for _ in kinds]
    item = 0
    for shard, size in enumerate(source.shard_sizes):
        for _ in range(size):
            buckets[kinds.index(shapes[item])][shard].append(item)
            item += 1
    return BucketOrder(buckets, batch, seed, pool)
