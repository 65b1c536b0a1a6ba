"""torch.distributed.checkpoint on safetensors: what each rank writes, and how any other mesh reads it.

The planners of torch do the resharding; here are the storage for them, and a save planner which copies to the host only
what this rank will write, so that the write itself can wait for another thread.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from utils import shards
from utils.shards import Entry, Groups, Piece, Table

# said of every save and load of a single process, where it is what is meant
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# ---------------------------------------------------------------------------------------------------------------- save


class StagedPlanner(DefaultSavePlanner):
    """Plans this rank's part of the tensors, and copies it to the host, when it is made.

    A tensor that several ranks hold whole, or a shard that several replicas hold, is one rank's to write, by turns: so
    it is copied once, too. What goes wrong is kept until the plans are exchanged, where all ranks learn of it.
    """

    def __init__(self, tensors: Groups, rank: int, ranks: int, *, copy: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.items: list[WriteItem] = []
        self.copies: dict[MetadataIndex, Tensor] = {}
        self.problem: Exception | None = None
        try:
            flat = {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}
            self._stage(owned(flat, rank, ranks), copy)
        except Exception as problem:
            self.problem = problem

    def _stage(self, tensors: dict[str, Tensor], copy: bool) -> None:
        for item in create_default_local_save_plan(tensors, False).items:
            tensor = tensors[item.index.fqn]
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if local.numel() or not tensor.numel():  # a rank beyond the end of a short dimension has nothing to write
                shards.dtype_name(local.dtype)
                host = local.to("cpu", copy=copy, memory_format=torch.contiguous_format)
                self.copies[item.index] = host.contiguous()  # `to` leaves what it need not copy as it is
                self.items.append(item)

    def create_local_plan(self) -> SavePlan:
        """Returns no plan: each rank knows its part, and reports it when it is written. Only failures are exchanged.

        The plans of 64 ranks of a 14B model are 320 000 objects: rank 0 could not train while it unpacked them.
        """
        if self.problem is not None:
            raise self.problem
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return SavePlan(self.items)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.copies[index]


def owned(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What ``rank`` of ``ranks`` is to write: of equal copies, the rank with the fewest elements so far takes the next.

    Every rank counts the same way, so they agree without asking. A plain tensor is taken to be the same on all ranks.
    """
    loads: dict[Any, list[int]] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key: Any = None
        place, places = rank, ranks
        if isinstance(tensor, DTensor):
            at = tensor.device_mesh.get_coordinate()
            if at is None:
                continue
            if any(placement.is_partial() for placement in tensor.placements):
                raise ValueError(f"{name} is a partial sum: reduce it before it is saved")
            dims = tuple(dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
            key, place, places = (tensor.device_mesh, dims), 0, 1
            for dim in dims:
                size = tensor.device_mesh.size(dim)
                place, places = place * size + at[dim], places * size
        load = loads.setdefault(key, [0] * places)
        least = load.index(min(load))
        load[least] += tensor.numel()
        if least == place:
            out[name] = tensor
    return out


class Writer(StorageWriter):
    """Writes ``<group>.safetensors`` (of several ranks, ``<group>-00002-of-00004.safetensors``) into ``folder``.

    prepare: called on the coordinator before anyone writes. publish: called there with the table after all have
    written. What either raises, or any rank's write, is raised on all ranks.
    """

    def __init__(
        self, folder: Path, rank: int, ranks: int, prepare: Callable[[], None], publish: Callable[[Table], None]
    ) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.prepare, self.publish = prepare, publish

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.prepare()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file a group."""
        groups: dict[str, dict[str, WriteItem]] = {}
        for item in plan.items:
            group, _, name = item.index.fqn.partition("/")
            groups.setdefault(group, {})[name] = item
        part: Table = {}
        for group, items in groups.items():
            tensors: dict[str, Any] = {name: planner.resolve_data(item) for name, item in items.items()}
            ending = "" if self.ranks == 1 else f"-{self.rank + 1:05d}-of-{self.ranks:05d}"
            file = f"{group}{ending}{shards.SUFFIX}"
            crcs = shards.write_file(self.folder / file, tensors)
            for name, item in items.items():
                data = item.tensor_data
                assert data is not None
                piece = Piece(file, tuple(data.chunk.offsets), tuple(data.chunk.sizes), crcs[name])
                part.setdefault(group, {})[name] = Entry(data.properties.dtype, tuple(data.size), [piece])
        return _done([WriteResult(MetadataIndex(""), 0, json.dumps(shards.table_to_json(part)))])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.publish(shards.merged(shards.table_from_json(json.loads(of.storage_data)) for (of,) in results))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, (str, Path))


class Failed(Exception):
    """rank: the first one that failed, of those that take part. problem: what it raised."""

    def __init__(self, error: CheckpointException) -> None:
        self.rank = min(error.failures)
        self.problem = error.failures[self.rank][0]
        super().__init__(f"rank {self.rank}: {self.problem!r}")


class Unreachable(Exception):
    """A rank is gone, or did not answer in time."""


def save(writer: Writer, planner: StagedPlanner, group: dist.ProcessGroup | None) -> None:
    """Write what was staged. Every rank of ``group`` calls it; without one this process is alone.

    Raises Failed, on all ranks alike, when one of them failed.
    """
    try:
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise Failed(error) from error
    except RuntimeError as error:  # the steps' own errors come as above: this is the exchange between them
        raise Unreachable(str(error).splitlines()[0]) from error


# ---------------------------------------------------------------------------------------------------------------- load


class Reader(StorageReader):
    """Reads the pieces that a ``Table`` lists from the files in ``folder``."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.folder = folder
        self.entries = {f"{group}/{name}": entry for group, of in table.items() for name, entry in of.items()}
        self.pieces = {
            MetadataIndex(fqn, piece.offsets): piece for fqn, entry in self.entries.items() for piece in entry.pieces
        }

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self) -> Metadata:
        return Metadata(
            {
                fqn: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in entry.pieces],
                )
                for fqn, entry in self.entries.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies each overlap of a saved piece with what this rank holds into place."""
        items: list[ReadItem] = plan.items
        wanted = []
        for item in items:
            at = item.storage_index
            wanted.append((at.fqn.partition("/")[2], self.entries[at.fqn], self.pieces[at]))
        for place, piece in shards.read_pieces(self.folder, wanted):
            item = items[place]
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece[box])
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, (str, Path))


class LocalLoadPlanner(DefaultLoadPlanner):
    """Plans what to read without telling the other ranks: the exchange would cost more than the reading."""

    def create_local_plan(self) -> LoadPlan:
        self.rank_plan = super().create_local_plan()
        return LoadPlan([])

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return self.rank_plan


def load(folder: Path, table: Table, tensors: Groups, group: dist.ProcessGroup | None) -> None:
    """Fill ``tensors`` in place: each rank its own shards, whatever shards were saved.

    Raises on all ranks alike what the first failing rank raised: ``shards.Damaged``, or what planning found.
    """
    flat = {f"{name}/{key}": value for name, values in tensors.items() for key, value in values.items()}
    needed = {name: table[name] for name in tensors if name in table}
    planner = LocalLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(
            flat,
            storage_reader=Reader(folder, needed),
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise Failed(error).problem from error


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
