"""What each rank does in test_checkpoint_dcp.py: `torchrun -m tests.distributed.checkpoint_worker SCENE FOLDER`."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import checkpoint, distributed, shards
from utils.errors import UserError
from utils.optim_state import flatten_optimizer, restore_optimizer
from utils.optimizers.adamw import MomentumFreeAdamW

Everything = dict[str, dict[str, Tensor]]


class Run:
    """Two networks of sizes that no number of ranks divides, an average, and three optimizers, on any mesh or none."""

    def __init__(self, mesh: DeviceMesh | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.nets = {"student": network(), "critic": network()}
        if mesh is not None:
            for net in self.nets.values():
                fully_shard(net, mesh=mesh)
        self.ema = {name: p.detach().clone() for name, p in self.nets["student"].named_parameters()}
        critic = dict(self.nets["critic"].named_parameters())
        self.optimizers: dict[str, tuple[str, torch.optim.Optimizer]] = {
            "student_adamw": ("student", MomentumFreeAdamW(self.nets["student"].parameters(), 1e-2, 0.9, 1e-8, 0.01)),
            "critic_adamw": ("critic", torch.optim.AdamW([p for p in critic.values() if p.ndim != 2], lr=1e-2)),
            "critic_sgd": (
                "critic",
                torch.optim.SGD([p for p in critic.values() if p.ndim == 2], lr=1e-2, momentum=0.9),
            ),
        }

    def step(self, number: int) -> None:
        """An update from gradients that depend on the name and the number, whatever the mesh."""
        for name, net in self.nets.items():
            for key, p in net.named_parameters():
                p.grad = like(p, keyed(f"{name}.{key}", number, p.shape))
        for _, optimizer in self.optimizers.values():
            optimizer.step()
        with torch.no_grad():
            for key, p in self.nets["student"].named_parameters():
                self.ema[key].lerp_(p, 0.1)

    def tensors(self) -> tuple[Everything, dict[str, Any]]:
        tensors: Everything = {name: dict(net.state_dict()) for name, net in self.nets.items()}
        tensors["student_ema"] = self.ema
        state = {}
        for name, (net, optimizer) in self.optimizers.items():
            tensors[name], state[name] = flatten_optimizer(optimizer, self.nets[net].named_parameters())
        return tensors, state

    def load(self, path: Path, group: dist.ProcessGroup | None) -> None:
        layout, state = checkpoint.layout(path), checkpoint.load_state(path)
        tensors: Everything = {name: dict(net.state_dict()) for name, net in self.nets.items()}
        tensors["student_ema"] = self.ema
        for name, (net, optimizer) in self.optimizers.items():
            named = self.nets[net].named_parameters()
            tensors[name] = restore_optimizer(optimizer, named, layout[name], state[name])
        checkpoint.load_into(path, layout, tensors, group)

    def whole(self) -> Everything:
        """Everything, gathered."""
        return {group: {k: full(v) for k, v in values.items()} for group, values in self.tensors()[0].items()}


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 2))  # on 4 ranks: 2 2 2 1, 2 2 1 0, 1 1 0 0
    net.register_buffer("table", torch.arange(3.0))  # the same on all ranks
    net[0].to(torch.bfloat16)
    return net


def keyed(name: str, number: int, shape: torch.Size) -> Tensor:
    seed = sum(ord(char) * (i + 1) for i, char in enumerate(name)) * 100 + number
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def like(p: Tensor, value: Tensor) -> Tensor:
    value = value.to(p.dtype)
    return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value


def full(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def assert_equal(a: Everything, b: Everything) -> None:
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys(), group
        for name, value in a[group].items():
            assert value.dtype == b[group][name].dtype and torch.equal(value, b[group][name]), (group, name)


@contextmanager
def refused(saying: str) -> Iterator[None]:
    """The same UserError of one line on every rank."""
    try:
        yield
    except UserError as error:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, str(error))
        assert len(set(said)) == 1 and "\n" not in said[0], said
        assert saying in said[0], said[0]
    else:
        raise AssertionError(f"nothing was refused: {saying}")


def four(folder: Path) -> None:
    """Save on four shards; load on 2 x 2 replicas; then all that can go wrong on one rank."""
    run = Run(init_device_mesh("cpu", (4,)), seed=0)
    for number in range(3):
        run.step(number)
    before = run.whole()
    if dist.get_rank() == 0:
        checkpoint.save(folder / "whole", 3, before, run.tensors()[1])
    saver = checkpoint.Saver(folder / "four", background=True)
    saver.save(3, *run.tensors())
    for number in range(3, 5):
        run.step(number)  # while it is being written
    saver.wait()
    after = run.whole()
    if dist.get_rank() == 0:
        checkpoint.save(folder / "whole", 5, after, run.tensors()[1])

    hsdp = Run(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), seed=1)
    hsdp.load(folder / "four/step_00000003", saver.group)
    assert_equal(hsdp.whole(), before)
    replicas = checkpoint.Saver(folder / "hsdp")
    replicas.save(3, *hsdp.tensors())
    errors(folder / "four", saver, run)


def errors(root: Path, saver: checkpoint.Saver, run: Run) -> None:
    rank = dist.get_rank()
    good = root / "step_00000003"
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))  # its disk is full
    with refused("step_00000004 could not be written: rank 2: File too large; earlier checkpoints are intact"):
        saver.save(4, *run.tensors())
        saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    assert [path.name for path in root.iterdir()] == [good.name]

    try:
        dtype = torch.cfloat if rank == 1 else torch.float
        saver.save(4, {"net": {f"w{i}": torch.ones(2, dtype=dtype) for i in range(4)}}, {})  # one for each to write
        saver.wait()
        raise AssertionError("a dtype without a name was saved")
    except ValueError as error:
        assert "complex64 cannot be saved" in str(error)
    saver.save(5, *run.tensors())  # nobody is out of step
    saver.wait()

    dist.barrier()
    flipped = root / "step_00000005/critic-00003-of-00004.safetensors"
    if rank == 0:
        data = flipped.read_bytes()
        flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    with refused("step_00000005/critic-00003-of-00004.safetensors is corrupt (the checksum of"):
        run.load(root / "step_00000005", saver.group)
    dist.barrier()
    if rank == 0:
        flipped.write_bytes(data[:-1])
    dist.barrier()
    with refused("step_00000005/critic-00003-of-00004.safetensors is truncated"):
        checkpoint.find_resume("auto", root, saver.group)
    dist.barrier()
    if rank == 0:
        flipped.write_bytes(data)


def two(folder: Path) -> None:
    """Two ranks load what one process and what replicas saved, train as the four did, and save for one process."""
    for source in ("whole", "hsdp"):
        run = Run(init_device_mesh("cpu", (2,)), seed=2)
        saver = checkpoint.Saver(folder / f"two_{source}")
        run.load(folder / source / "step_00000003", saver.group)
        for number in range(3, 5):
            run.step(number)
        saver.save(5, *run.tensors())


def killed(folder: Path) -> None:
    """Rank 0 or 1, by the folder's name, dies by SIGKILL while the second save is being written."""
    victim = int(folder.name[-1])
    run = Run(init_device_mesh("cpu", (2,)), seed=0)
    run.step(0)
    saver = checkpoint.Saver(folder, background=True)
    saver.save(1, *run.tensors())
    saver.wait()
    write_file = shards.write_file

    def write_and_die(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        if dist.get_rank() == victim and path.name.startswith("critic_adamw"):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write_file(path, tensors)

    shards.write_file = write_and_die
    run.step(1)
    saver.save(2, *run.tensors())
    saver.wait()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"four": four, "two": two, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()
    distributed.leave(0)
