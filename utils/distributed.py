"""Plain data parallelism over torch.distributed; in a single process every function is a no-op of the same meaning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "mean", "max", "min"]


def init() -> None:
    """Join the process group of torchrun's environment (nccl with CUDA, else gloo); without one do nothing."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        dist.init_process_group("nccl", device_id=device())
    else:
        dist.init_process_group("gloo")


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


def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Sum ``tensors`` over the processes, in place; one collective per dtype, whatever their number.

    Every process gives the same shapes and dtypes in the same order.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


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
