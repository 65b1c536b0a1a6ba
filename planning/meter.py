"""What a program costs without running it: memory, FLOPs and traffic, counted as its operators pass the dispatcher.

Knows nothing of the project's networks: whoever runs the program says in which phase it is and whose the tensors are.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from planning.shapes import ShapeCache

aten = torch.ops.aten
FLASH, FLASH_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
WORKSPACE, GATHERED, GRADIENTS = "kernel workspace", "gathered weights", "gradients"


class Owner(NamedTuple):
    """Whose memory it is, and what it is for."""

    network: str
    category: str


class Traffic(NamedTuple):
    """Bytes that a GPU sends in collectives of one kind, to the GPUs of its node or beyond."""

    collective: str
    inter_node: bool


FLOPS = "flops"
Cost = dict[Any, float]  # FLOPS or Traffic -> number


@dataclass
class Phase:
    """peak: most bytes held at a time. parts: whose they were at that time; what lies in the CPU's memory is here, too,
    but not in the peak. cost: what was computed and sent."""

    peak: float = 0
    parts: dict[Owner, float] = field(default_factory=dict)
    cost: dict[Any, float] = field(default_factory=lambda: defaultdict(float))


class _Storage:
    __slots__ = ("owner", "reference", "size")

    def __init__(self, owner: Owner, size: int) -> None:
        self.owner, self.size = owner, size
        self.reference: Any = None


class Meter(TorchDispatchMode):
    """Counts all that runs inside, by phase.

    granularity: bytes to whose multiple an allocation is rounded up. gpus_per_node: ranks of one node are neighbours.
    cuda: also count what CUDA's kernels allocate within and those of a CPU do not. Numbers that the program reads from
    tensors are made up: see `_READ`. slow: leave all operators to FakeTensorMode, as a check.
    """

    def __init__(self, *, granularity: int = 1, gpus_per_node: int = 8, cuda: bool = False, slow: bool = False) -> None:
        super().__init__()
        self.granularity, self.gpus_per_node, self.cuda, self.slow = granularity, gpus_per_node, cuda, slow
        self.owner = Owner("other", "activations")
        self.host: set[Owner] = set()
        self.held: dict[Owner, float] = {}
        self.total = 0
        self.phases: dict[Hashable, Phase] = {}
        self.phase = Phase()
        self._storages: dict[int, _Storage] = {}
        self._shapes = ShapeCache()
        self._paused = False

    # ------------------------------------------------------------------------------------------------ said from outside

    def enter(self, key: Hashable) -> None:
        """What follows belongs to the phase `key`, which may be entered again."""
        self.phase = self.phases.setdefault(key, Phase())
        self._note_peak()

    def assign(self, tensors: Iterable[Any], owner: Owner) -> None:
        """These tensors' memory is `owner`'s; of a sharded one, this process's part. What is no tensor is left out."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                storage = self._storages.get(local.untyped_storage()._cdata)
                if storage is not None and storage.owner != owner:
                    size = storage.size
                    self._resize(storage, 0)
                    storage.owner = owner
                    self._resize(storage, size)

    def computed(self, flops: float) -> None:
        """So many FLOPs that no operator shows, in the present phase."""
        if flops:
            self.phase.cost[FLOPS] += flops

    def category(self, name: str) -> Owner:
        """That of the network that runs."""
        return Owner(self.owner.network, name)

    # ----------------------------------------------------------------------------------------------------- counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func is aten._local_scalar_dense.default:
            return _READ.get(args[0].dtype, 1)
        if DTensor in types:
            return NotImplemented  # it calls again, with its local tensors
        if self._paused:
            return func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        kwargs = kwargs or {}
        out = func(*args, **kwargs) if self.slow else self._shapes(func, args, kwargs)
        if packet in _FORMULAS:
            self.phase.cost[FLOPS] += _FORMULAS[packet](*args, **kwargs, out_val=out)
        elif func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args, out)
        elif func.namespace == "fsdp":  # gathered weights are copied to where they will be used
            self.assign(_tensors(kwargs.get("out", ())), self.category(GATHERED))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if self.cuda and packet is FLASH_BACKWARD:
            # FlashAttention 2 sums dq in fp32, and keeps a number a row
            query = args[1]
            self._transient(4 * (query.numel() + query.numel() // query.shape[-1]))
        return out

    def _see(self, tensor: Tensor) -> None:
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = _Storage(self.owner, 0)
            storage.reference = weakref.ref(untyped, lambda _: self._forget(key))
        if tensor.device.type != "meta":
            self._resize(storage, self._rounded(untyped.nbytes()))

    def _forget(self, key: int) -> None:
        self._resize(self._storages.pop(key), 0)

    def _rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity

    def _resize(self, storage: _Storage, size: int) -> None:
        change = size - storage.size
        if change == 0:
            return
        storage.size = size
        self.held[storage.owner] = self.held.get(storage.owner, 0) + change
        if storage.owner not in self.host:
            self.total += change
            if change > 0:
                self._note_peak()

    def _note_peak(self) -> None:
        if self.total > self.phase.peak:
            self.phase.peak, self.phase.parts = self.total, self.held.copy()

    def _transient(self, size: int) -> None:
        storage = _Storage(self.category(WORKSPACE), 0)
        self._resize(storage, self._rounded(size))
        self._resize(storage, 0)

    def _collective(self, func: Any, args: Any, out: Any) -> None:
        name = func._schema.name
        if name.endswith(("wait_tensor", "barrier")):
            return
        kind, buffer, position = _COLLECTIVES[name]
        group = args[position]
        if isinstance(group, str):
            group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        else:
            group = dist.ProcessGroup.unbox(group)
        size = sum(t.nbytes for t in _tensors(out if buffer is None else args[buffer]))
        here, ranks = dist.get_rank() // self.gpus_per_node, dist.get_process_group_ranks(group)
        neighbours = sum(rank // self.gpus_per_node == here for rank in ranks)
        for inter_node, sent in enumerate(sent_bytes(kind, size, len(ranks), neighbours)):
            self.phase.cost[Traffic(kind, bool(inter_node))] += sent
        if kind == "all-gather":
            self.assign(_tensors(args[0]), self.category(GATHERED))
        elif kind == "reduce-scatter":
            self.assign([*_tensors(args[0]), *_tensors(args[1])], self.category(GRADIENTS))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Fake tensors on a pretended device, counted. Nothing inside has values, and nothing takes memory."""
        fake = self._shapes.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # its memo's weak references would forbid a module's conversion to another type or device
        fake.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign, assignment]
        resize, infer = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def resized(untyped: torch.UntypedStorage, size: int) -> Any:
            result = resize(untyped, size)
            storage = self._storages.get(untyped._cdata)
            if storage is not None:  # weights that are gathered, or freed again
                if storage.size == 0:
                    storage.owner = self.category(GATHERED)
                self._resize(storage, self._rounded(size))
            return result

        def inferred(propagator: ShardingPropagator, schema: Any) -> Any:
            before, self._paused = self._paused, True  # DTensor asks for shapes with whole tensors that nobody makes
            try:
                return infer(propagator, schema)
            finally:
                self._paused = before

        # Torch has no hook for these. A TorchFunctionMode is off within `backward`, where checkpointed blocks are
        # computed again.
        patches: list[AbstractContextManager[Any]] = [
            mock.patch.object(torch.UntypedStorage, "resize_", resized),
            mock.patch.object(torch.cuda, "is_available", lambda: False),  # the pretended device is the same everywhere  # noqa: PT008 - no mock of a test
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", inferred),
        ]
        if self.cuda:
            patches.append(mock.patch.object(functional, "rms_norm", _FusedRMSNorm.of))
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            with fake, self:
                yield


class _FusedRMSNorm(torch.autograd.Function):
    """The memory of CUDA's RMS norm, one kernel each way, where a CPU's keeps intermediate results."""

    @classmethod
    def of(cls, x: Tensor, _shape: Any, weight: Tensor, _eps: float) -> Tensor:
        """With the arguments of `functional.rms_norm`."""
        out: Tensor = cls.apply(x, weight)
        return out

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def sent_bytes(kind: str, size: int, ranks: int, neighbours: int) -> tuple[float, float]:
    """Bytes that a GPU sends (within its node, to other nodes) in one collective over `ranks` GPUs.

    size: bytes of the whole buffer (gathered, scattered, reduced or exchanged). neighbours: how many of the ranks are
    in this node. Rings, as NCCL's, spread evenly over a node's links: of a node's `neighbours` hops one leaves it.
    """
    whole = size * (ranks - 1) / ranks
    if kind == "all-to-all":  # a part of its own to everyone
        return size * (neighbours - 1) / ranks, size * (ranks - neighbours) / ranks
    if kind == "all-reduce":  # a reduce-scatter and an all-gather
        whole *= 2
    elif kind == "broadcast":
        whole = size
    leaving = 0.0 if neighbours == ranks else whole / neighbours
    return whole - leaving, leaving


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Any] = {**flop_registry, FLASH: _flash, FLASH_BACKWARD: _flash_backward}

# What is read from a tensor of this type, 1 for any other. In fp64 ranks tell each other that something is wrong.
_READ: dict[torch.dtype, float] = {torch.float64: 0.0, torch.float32: 1.0, torch.bfloat16: 1.0, torch.bool: True}

# operator: its name here, which argument is the whole buffer (None: the result), which is the group
_COLLECTIVES: dict[str, tuple[str, int | None, int]] = {
    "c10d::_allgather_base_": ("all-gather", 0, 2),
    "c10d::allgather_": ("all-gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, 2),
    "c10d::allreduce_": ("all-reduce", 0, 1),
    "c10d::alltoall_base_": ("all-to-all", 1, 2),
    "c10d::broadcast_": ("broadcast", 0, 1),
    "c10d::scatter_": ("scatter", 0, 2),
    "_c10d_functional::all_reduce": ("all-reduce", 0, 2),
    "_c10d_functional::all_reduce_": ("all-reduce", 0, 2),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", None, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0, 3),
    "_c10d_functional::all_to_all_single": ("all-to-all", 0, 3),
    "_c10d_functional::broadcast": ("broadcast", 0, 2),
}
