"""Which numbers keep an update from being taken, in one process; whose they are: tests/distributed/test_watchdog.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from utils.finite import FiniteCheck
from utils.optim import LRScheduleConfig, NetworkOptimizer, trainable
from utils.optimizers.adamw import AdamWConfig


def net(gradient_of_second: float) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    layers[1].weight.grad[1, 2] = gradient_of_second
    return layers


def checked(layers: nn.Module, losses: dict[str, float], **clip: float | None) -> str | None:
    optimizer = NetworkOptimizer(trainable(layers), AdamWConfig(**clip), LRScheduleConfig(), 10)  # type: ignore[arg-type]
    check = FiniteCheck(losses, optimizer.named)
    return check.agree(float(optimizer.clip()))


def test_finite_numbers_pass() -> None:
    assert checked(net(1e3), {"loss": 1.0}) is None


@pytest.mark.parametrize("clip", [{}, {"clip_norm": None, "clip_value": 0.1}], ids=["norm", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_parameter_is_named_though_clipping_comes_between(bad: float, clip: dict[str, float | None]) -> None:
    """Clipping by a NaN makes every gradient NaN; clipping by value makes infinity finite."""
    assert checked(net(bad), {"loss": 1.0}, **clip) == "gradient of 1.weight on rank 0"


def test_a_bad_metric_is_enough() -> None:
    losses = {"loss": float("inf"), "kl": 0.0, "luma": float("nan")}
    assert checked(net(1.0), losses) == "loss, luma on rank 0"


def test_a_norm_that_overflows_is_not_finite_either() -> None:
    assert checked(net(3e38), {"loss": 1.0}) == "the gradient's norm"


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_gradients_are_looked_at_where_they_are_held(mesh: dist.DeviceMesh) -> None:
    layers = net(float("nan"))
    named = dict(layers.named_parameters())
    sharded = {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in named.items()}
    for name, p in sharded.items():
        p.grad = distribute_tensor(named[name].grad, mesh, [Shard(0)])
    assert FiniteCheck({}, sharded).agree(float("nan")) == "gradient of 1.weight (its shard) on rank 0"
    sharded["1.weight"].grad = sharded["1.weight"].grad.nan_to_num()
    assert FiniteCheck({}, sharded).agree(1.0) is None
