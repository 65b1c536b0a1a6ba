"""The mesh of processes: world = replicate x shard x sequence, sequence innermost, where links are fastest."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from utils import distributed
from utils.errors import ConfigError
from utils.fields import check_modes
from utils.parallel.deepspeed import DeepSpeedConfig


class EngineKind(StrEnum):
    fsdp2 = "fsdp2"  # PyTorch's own sharding
    deepspeed = "deepspeed"  # ZeRO


@dataclass
class ReshardConfig:
    """Whether a network gives its gathered weights back after each forward pass of a block, and gathers them again for
    the backward: true needs less memory, false less communication."""

    student: bool = True
    critic: bool = True
    teacher: bool = True


@dataclass
class ParallelConfig:
    """How one run is spread over its processes: world = replicate x shard x sequence.

    engine: what spreads a trained network; a frozen one is sharded the same way under both.
    replicate: copies of the weights (hybrid sharding).
    shard: processes that share one copy, null for what is left of the world.
    sequence: processes that share the tokens of one sample (Ulysses).
    reshard_after_forward: see ReshardConfig.
    keep_gathered_in_rollout: the student's weights stay gathered from the first to the last pass of a rollout instead
        of being gathered for each.
    sync_each_micro_batch: gradients are reduced after each micro-batch and not once an update, which saves holding them
        unsharded between (only with accumulation).
    offload_optimizer: trained shards, their gradients and optimizer states live in CPU memory, and the update is made
        there.
    offload_teacher: the frozen network's shards live in CPU memory.
    compile: torch.compile of each block of networks that run without a KV cache: critic, teacher, a bidirectional
        student.
    deepspeed: what engine deepspeed takes beside these.
    """

    engine: EngineKind = EngineKind.fsdp2
    replicate: int = 1
    shard: int | None = None
    sequence: int = 1
    reshard_after_forward: ReshardConfig = field(default_factory=ReshardConfig)
    keep_gathered_in_rollout: bool = False
    sync_each_micro_batch: bool = False
    offload_optimizer: bool = False
    offload_teacher: bool = False
    compile: bool = False
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        check_modes(self)
        for name in ("replicate", "shard", "sequence"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.engine is EngineKind.deepspeed:
            self._refuse_what_zero_lacks()

    def _refuse_what_zero_lacks(self) -> None:
        for name in ("replicate", "sequence"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name} must be 1 with engine deepspeed, got {getattr(self, name)}: or choose fsdp2")
        for name in ("keep_gathered_in_rollout", "sync_each_micro_batch", "compile"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for engine deepspeed: set it to false, or choose fsdp2")
        if self.offload_optimizer:
            raise ValueError("offload_optimizer is fsdp2's: for engine deepspeed set deepspeed.offload_optimizer")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands, and the meshes that collectives run over (None in a single process).

    devices: dims (replicate, shard, sequence). weights: dims (replicate, weights), where `weights` is shard and
    sequence together: all processes of one copy of the weights hold an equal part of them.
    """

    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    rank: int = 0
    devices: DeviceMesh | None = None
    weights: DeviceMesh | None = None

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """All process groups of the mesh."""
        return [group for mesh in (self.devices, self.weights) if mesh is not None for group in mesh.get_all_groups()]

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.sequence

    @property
    def dp_size(self) -> int:
        """How many different batches run at a time."""
        return self.replicate * self.shard

    @property
    def dp_rank(self) -> int:
        """Which of them runs here; the ranks of one sequence group share it."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The processes that share a sample's tokens; None where nobody shares."""
        return None if self.devices is None or self.sequence == 1 else self.devices.get_group("sequence")

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh for `fully_shard`: 1-D, or 2-D (replicate, weights) for hybrid sharding."""
        assert self.weights is not None, "a single process shards nothing"
        return self.weights if self.replicate > 1 else self.weights["weights"]


def legal_splits(world: int) -> list[tuple[int, int, int]]:
    """All (replicate, shard, sequence) whose product is `world`."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    return [(r, world // r // q, q) for q in divisors for r in divisors if (world // q) % r == 0]


def split(config: ParallelConfig, world: int) -> tuple[int, int, int]:
    """(replicate, shard, sequence) of `world` processes. Raises ConfigError listing the legal ones."""
    shard = config.shard
    if shard is None:
        shard = max(world // (config.replicate * config.sequence), 1)
    chosen = (config.replicate, shard, config.sequence)
    if config.replicate * shard * config.sequence == world:
        return chosen
    legal = legal_splits(world)
    near = [s for s in legal if s[2] == config.sequence] or [s for s in legal if s[0] == config.replicate] or legal
    names = "parallel.replicate x parallel.shard x parallel.sequence"
    raise ConfigError(
        f"{names} = {' x '.join(map(str, chosen))} is not the world of {world} "
        f"{'process' if world == 1 else 'processes'}: choose {', '.join('x'.join(map(str, s)) for s in near)}"
    )


def build_mesh(config: ParallelConfig, world: int, device: torch.device | None = None) -> Mesh:
    """The mesh of the running process group; of one process alone without any. Raises ConfigError for a split that is
    not `world`."""
    replicate, shard, sequence = split(config, world)
    if world == 1:
        return Mesh()
    kind = (device or distributed.device()).type
    devices = init_device_mesh(kind, (replicate, shard, sequence), mesh_dim_names=("replicate", "shard", "sequence"))
    weights = init_device_mesh(kind, (replicate, shard * sequence), mesh_dim_names=("replicate", "weights"))
    return Mesh(replicate, shard, sequence, dist.get_rank(), devices, weights)
