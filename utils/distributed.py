"""What processes share over torch.distributed. In a single process each function returns its own values."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import rendezvous
from utils.activity import doing

Reduction = Literal["sum", "mean", "max", "min"]


def init(timeout: timedelta | None = None) -> None:
    """Join the process group of torchrun's environment (nccl with CUDA, else gloo); without one do nothing.

    timeout: of its collectives, None for torch's own. Groups made later have torch's own: see ``set_timeout``.
    With CUDA there is gloo beside nccl, for what lies in CPU memory. Raises UserError if a rank does not come.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if world_size() == 1 or dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=timeout,
        store=rendezvous.joined_store(rank(), world_size(), timeout or dist.default_pg_timeout),
        rank=rank(),
        world_size=world_size(),
        device_id=device() if torch.cuda.is_available() else None,
    )


def set_timeout(timeout: timedelta | None, groups: Iterable[dist.ProcessGroup]) -> None:
    """Give the collectives of these groups (a mesh's, say) a timeout; None leaves them torch's own."""
    if timeout is None:
        return
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


_LEAVING: list[Callable[[], None]] = []


def before_leaving(action: Callable[[], None]) -> None:
    """Have `action` run as this process ends, by `leave` or otherwise; by a kill it is not."""
    atexit.register(action)
    _LEAVING.append(action)


def leave(code: int, *, together: bool = True) -> NoReturn:
    """End this process with ``code``; together: all ranks are doing so, and the process group ends first.

    With several ranks it exits by os._exit, because a gloo thread can abort the process during interpreter shutdown
    (pytorch/pytorch#190489): a finished run would count as a failed one.
    """
    if not _joined():
        sys.exit(code)
    if together:
        dist.destroy_process_group()
    for action in _LEAVING:
        action()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    """This process's number in 0 .. world_size() - 1 (from torchrun's environment before ``init``)."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes (from torchrun's environment before ``init``)."""
    return dist.get_world_size() if _joined() else int(os.environ.get("WORLD_SIZE", "1"))


def nodes() -> int:
    """Number of machines, as torchrun or srun says it; 1 where neither does."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_NODES") or 1)


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU. srun can show each process one GPU, which is its first."""
    if torch.cuda.is_available():
        alone = torch.cuda.device_count() == 1
        return torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def unused_gpus() -> str | None:
    """What to say where the processor is used though the driver of NVIDIA's GPUs is here; None elsewhere, and where
    somebody hid them (CUDA_VISIBLE_DEVICES)."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or shutil.which("nvidia-smi") is None:
        return None
    return f"nvidia-smi is here, and torch {torch.__version__} finds no GPU: this runs on the processor. See doctor.py"


def barrier() -> None:
    """Wait for every process."""
    if world_size() == 1:
        return
    with doing("wait for all ranks"):
        if torch.cuda.is_available():
            dist.barrier(device_ids=[device().index])
        else:
            dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory; another tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def stored(parameter: Tensor) -> Tensor:
    """What is kept of a parameter between passes: itself, or, where ZeRO-3 has cut it up, this process's flat part."""
    return getattr(parameter, "ds_tensor", parameter)


def full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process: a collective. Another tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


@torch.no_grad()
def like(value: Tensor, target: Tensor) -> Tensor:
    """``value``, whole on every process, sharded as ``target`` is, without communication."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def all_reduce_scalars(values: Mapping[str, float], op: Reduction = "sum") -> dict[str, float]:
    """Reduce numbers by name over the processes, in fp64. Every process gives the same names, in any order."""
    if world_size() == 1 or not values:
        return dict(values)
    names = sorted(values)
    numbers = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device())
    reduce = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
    with doing(f"{op} of {', '.join(names[:3])} over ranks"):
        dist.all_reduce(numbers, op=reduce)
        if op == "mean":
            numbers /= world_size()
        reduced = dict(zip(names, numbers.tolist(), strict=True))  # on a GPU this line waits
    return {name: reduced[name] for name in values}


def all_reduce_(tensor: Tensor) -> Tensor:
    """Sums a tensor over the processes, in place. Every process gives one of the same shape."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(held: Tensor, rows: Sequence[int]) -> Tensor | None:
    """What all processes hold of [sum(rows), ...], by rank, in the CPU memory of rank 0; elsewhere None.

    held: [rows[rank], ...] on the CPU, what this process holds. Nothing is sent by a process of 0 rows.
    rows: by rank, the same for all.
    """
    if world_size() == 1:
        return held
    with doing("gather rows of all ranks"):
        if not is_main():
            if rows[rank()]:
                dist.send(held.contiguous(), 0)
            return None
        parts = [held[: rows[0]]]
        for source, count in enumerate(rows):
            if source and count:
                parts.append(held.new_empty(count, *held.shape[1:]))
                dist.recv(parts[-1], source)
    return torch.cat(parts)


def union(held: Iterable[int]) -> set[int]:
    """The whole numbers from 0 on that any process holds."""
    numbers = sorted(set(held))
    if world_size() == 1:
        return set(numbers)
    most = int(all_reduce_scalars({"count": float(len(numbers))}, "max")["count"])
    padded = torch.tensor(numbers + [-1] * (most - len(numbers)), dtype=torch.int64, device=device())
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    with doing("gather numbers of all ranks"):
        dist.all_gather(parts, padded)
        return {number for part in parts for number in part.tolist() if number >= 0}


def all_gather_text(text: str, size: int = 256) -> list[str]:
    """The short texts of all processes, by rank; each cut to ``size`` bytes of UTF-8."""
    if world_size() == 1:
        return [text]
    raw = text.encode()[:size].ljust(size, b"\0")
    encoded = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device())
    parts = [torch.empty_like(encoded) for _ in range(world_size())]
    with doing("gather texts of all ranks"):
        dist.all_gather(parts, encoded)
        raws = [bytes(part.tolist()) for part in parts]
    return [raw.rstrip(b"\0").decode(errors="ignore") for raw in raws]


def all_gather_long_text(text: str) -> list[str]:
    """As ``all_gather_text``, whole, whatever its length."""
    longest = all_reduce_scalars({"bytes": float(len(text.encode()))}, "max")["bytes"]
    return all_gather_text(text, size=max(1, int(longest)))


def grouped(values: Sequence[str], shown: Callable[[int, str], str] = lambda _, value: value) -> str:
    """Values by rank in one line, equal ones together: ``ranks 0-6: abc, rank 7: def``.

    shown: how a value is written, from its number among the different ones and itself.
    """
    by_value: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        by_value.setdefault(value, []).append(number)
    return ", ".join(
        f"{ranks(numbers)}: {shown(place, value)}" for place, (value, numbers) in enumerate(by_value.items())
    )


def ranks(numbers: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {spans}" if len(numbers) == 1 else f"ranks {spans}"


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
