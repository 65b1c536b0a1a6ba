"""Sharding of a network over the mesh: FSDP2, hybrid sharding, precision of what is gathered, filling of the shards.

A network needs only `fsdp_units()`: the modules to shard one by one. What is left is the root's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from utils import distributed
from utils.parallel import deepspeed
from utils.parallel.mesh import EngineKind, Mesh, ParallelConfig
from utils.parallel.sequence import Splittable, apply_sequence_parallel


class Shardable(Protocol):
    """What `parallelize` asks of a network, beside being a module."""

    def fsdp_units(self) -> list[nn.Module]: ...


@dataclass(frozen=True)
class Sharding:
    """How one network takes part. compute_dtype: in which its units are gathered, None for their own."""

    compute_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    offload: bool = False
    compile: bool = False


def parallelize(net: nn.Module, mesh: Mesh, config: ParallelConfig, sharding: Sharding) -> None:
    """Splits the sequence of `net`, compiles and shards it, in place. In a single process nothing of it is shared.

    Its weights may still be on the meta device: `materialise` gives the shards memory, `fill` their values.
    """
    if mesh.sequence_group is not None:
        apply_sequence_parallel(cast(Splittable, net), mesh.sequence_group)
    if sharding.compile:
        for unit in cast(Shardable, net).fsdp_units():
            # inside the hooks of sharding, outside those of recomputation: names and state dicts stay as they are
            unit.forward = torch.compile(unit.forward)
    if config.engine is EngineKind.deepspeed and any(p.requires_grad for p in net.parameters()):
        if config.deepspeed.zero_stage == 3:
            deepspeed.partition(net, config.deepspeed)
    elif mesh.world > 1:
        _shard(net, mesh, sharding)


# Blocks return keys and values for the cache, as views; they are only ever read.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers that autocast runs in the compute precision


def _shard(net: nn.Module, mesh: Mesh, sharding: Sharding) -> None:
    """fully_shard, root first: the root takes all that must stay exact, the units their `CAST` layers alone.

    Units are gathered in the compute precision, in which autocast would use them anyway. Weights that are used in fp32
    whatever the precision (norms, modulation, time embedding) would be rounded by that, so they are the root's, which
    is gathered as it is stored; they are few. A frozen network is stored in the compute precision: nothing is cast.
    """
    units = cast(Shardable, net).fsdp_units()
    dtype = sharding.compute_dtype
    casts = dtype is not None and any(p.dtype != dtype for p in net.parameters())
    cast_anyway = {p for unit in units for m in unit.modules() if isinstance(m, CAST) for p in m.parameters()}
    of_units = cast_anyway if casts else {p for unit in units for p in unit.parameters()}
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if sharding.offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh.fsdp, "offload_policy": offload}
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fast = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # the root is used from the first operation to the last of forward and backward: it stays gathered between them
    fully_shard(net, reshard_after_forward=False, mp_policy=exact, ignored_params=of_units, **options)
    for unit in units:
        fully_shard(
            unit,
            reshard_after_forward=sharding.reshard_after_forward,
            mp_policy=fast if casts else exact,
            ignored_params={p for p in unit.parameters() if p not in of_units},
            **options,
        )
    for module in sharded_modules(net):
        # losses are shares of the global mean: their gradients are summed, never averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(net: nn.Module) -> list[FSDPModule]:
    return [module for module in net.modules() if isinstance(module, FSDPModule)]


def is_sharded(net: nn.Module) -> bool:
    return isinstance(net, FSDPModule) or deepspeed.is_partitioned(net)


def reshard(net: nn.Module) -> None:
    """Frees what is gathered. To be called before weights are written, or their flags: a gathered copy would go on
    being used."""
    for module in sharded_modules(net):
        module.reshard()
    deepspeed.release(net)


@contextmanager
def kept_gathered(net: nn.Module, keep: bool = True) -> Iterator[None]:
    """Each unit is gathered by its first pass inside and stays so until the end, where all is freed."""
    modules = sharded_modules(net)
    if not keep or not modules:
        yield
        return
    groups = [group for module in modules for group in _param_groups(module)]
    before = [group.post_forward_mesh_info for group in groups]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info
        reshard(net)


def _param_groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    # a state had one group or none before torch allowed several
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


@contextmanager
def frozen(net: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
    """These weights of `net`, or all, need no gradient inside: another network is being trained through this one, or
    another adapter of this one."""
    if isinstance(net, FSDPModule):
        # what is reduced, and in which precision, is settled at the first pass: not by one in which nothing is trained
        net._get_fsdp_state()._lazy_init()
    reshard(net)
    needed = [p for p in (net.parameters() if parameters is None else parameters) if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        reshard(net)
        for p in needed:
            p.requires_grad_(True)


def materialise(net: nn.Module, device: torch.device, *, offload: bool = False) -> None:
    """Memory, without values, for a network made on the meta device: for the whole or for this process's shards."""
    if not deepspeed.is_partitioned(net):  # that one has got its memory part by part
        net.to_empty(device=torch.device("cpu") if offload else device)


@torch.no_grad()
def fill(net: nn.Module, weights: Iterable[tuple[str, Tensor]], *, shared: bool = True) -> None:
    """Values for the parameters of `net`, one at a time, to wherever they are kept, in its dtype.

    weights: (name, full value); a name may come again. shared: they are rank 0's, and all ranks name them in the same
    order, the others without memory. So no process but rank 0 ever holds a full tensor, and that one at a time.
    """
    parameters: Mapping[str, Tensor] = dict(net.named_parameters())
    for name, value in weights:
        target = parameters[name]
        if isinstance(target, DTensor):
            _scatter(target, value)
        elif hasattr(target, "ds_tensor"):
            deepspeed.write(target, value)
        else:
            if not shared or distributed.is_main():
                target.copy_(value)
            if shared and distributed.world_size() > 1:
                dist.broadcast(target, 0)


def _scatter(target: DTensor, value: Tensor) -> None:
    """Rank 0 sends each process its rows, cut as `fully_shard` cuts them: like torch.chunk, the last may be short."""
    local = target.to_local()
    ways = target.device_mesh.size(-1)
    rows = -(-value.shape[0] // ways)
    received = local.new_empty((rows, *value.shape[1:]))
    parts: list[Tensor] | None = None
    if distributed.is_main():
        value = value.to(device=local.device, dtype=local.dtype)
        missing = rows * ways - value.shape[0]
        if missing:
            value = torch.cat([value, value.new_zeros((missing, *value.shape[1:]))])
        chunks = value.contiguous().split(rows)
        parts = [chunks[rank % ways] for rank in range(dist.get_world_size())]
    dist.scatter(received, parts, src=0)
    local.copy_(received[: local.shape[0]])
