"""What is shared over torch.distributed; in a single process every function is a no-op of the same meaning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Reduction = Literal["sum", "mean", "max", "min"]


def init(timeout: timedelta | None = None) -> None:
    """Join the process group of torchrun's environment (nccl with CUDA, else gloo); without one do nothing.

    timeout: after which a collective that some rank does not join is an error; null for torch's own. With CUDA there is
    gloo beside nccl, for what lies in CPU memory.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device(), timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in 0 .. world_size() - 1 (from torchrun's environment before ``init``)."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes (from torchrun's environment before ``init``)."""
    return dist.get_world_size() if _joined() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every process."""
    if world_size() == 1:
        return
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
    dist.all_reduce(numbers, op=reduce)
    if op == "mean":
        numbers /= world_size()
    reduced = dict(zip(names, numbers.tolist(), strict=True))
    return {name: reduced[name] for name in values}


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
