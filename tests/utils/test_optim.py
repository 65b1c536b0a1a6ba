"""Optimizers, schedules and clipping against closed forms."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.optim import LRScheduleConfig, NetworkOptimizer, optimizers, trainable
from utils.optim_state import flatten_optimizer, restore_optimizer
from utils.optimizers.adamw import AdamWConfig, MomentumFreeAdamW
from utils.optimizers.muon import Muon, MuonConfig
from utils.shards import Entry


def linear() -> nn.Linear:
    net = nn.Linear(3, 2)
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)
    return net


@pytest.mark.parametrize(
    ("config", "update", "expected"),
    [
        (LRScheduleConfig("constant"), 77, 1.0),
        (LRScheduleConfig("constant", warmup_steps=4), 1, 0.5),
        (LRScheduleConfig("linear", decay_start=0.5), 50, 1.0),
        (LRScheduleConfig("linear", decay_start=0.5), 75, 0.5),
        (LRScheduleConfig("linear", floor=0.2), 100, 0.2),
        (LRScheduleConfig("cosine"), 50, 0.5),
        (LRScheduleConfig("cosine", floor=0.1), 25, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        (LRScheduleConfig("cosine", warmup_steps=20), 20, 1.0),
        (LRScheduleConfig("cosine", warmup_steps=20), 60, 0.5),
    ],
)
def test_schedule_has_its_closed_form(config: LRScheduleConfig, update: int, expected: float) -> None:
    assert config.factor(update, 100) == pytest.approx(expected)


def test_first_adamw_update_has_its_closed_form() -> None:
    """With beta1 = 0 the step is -lr sign(g) (eps aside), after decoupled decay."""
    net = linear()
    optimizer = NetworkOptimizer(
        trainable(net), AdamWConfig(lr=0.1, weight_decay=0.5, clip_norm=None), LRScheduleConfig(), 10
    )
    net.weight.grad = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    net.bias.grad = torch.ones(2)
    assert optimizer.clip() == pytest.approx(math.sqrt(1 + 4 + 9 + 16 + 25 + 36 + 2))
    assert optimizer.step() == pytest.approx(0.1)
    torch.testing.assert_close(net.weight.detach(), 0.95 - 0.1 * net.weight.grad.sign())


def test_adamw_without_first_moments_is_adamw_at_beta1_zero_bit_for_bit() -> None:
    torch.manual_seed(3)
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.03, "eps": 1e-8, "weight_decay": 0.1}
    mine = MomentumFreeAdamW(ours.parameters(), beta2=0.99, **options)
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.0, 0.99), foreach=False, **options)
    for _ in range(20):
        x = torch.randn(3, 7)
        for net, optimizer in ((ours, mine), (theirs, reference)):
            net.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert "exp_avg" not in mine.state[ours.weight]


def test_clipping_by_norm_and_by_value() -> None:
    gradient = torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    for config, expected in (
        (AdamWConfig(clip_norm=1.0), gradient / 5),
        (AdamWConfig(clip_norm=9.0), gradient),
        (AdamWConfig(clip_norm=None, clip_value=2.0), gradient.clamp(-2, 2)),
    ):
        net = linear()
        net.weight.grad, net.bias.grad = gradient.clone(), torch.zeros(2)
        norm = NetworkOptimizer(trainable(net), config, LRScheduleConfig(), 1).clip()
        assert norm == pytest.approx(5.0)  # as it was, not as clipped
        torch.testing.assert_close(net.weight.grad, expected, atol=1e-5, rtol=1e-5)


def test_defect_10_clipping_never_turns_itself_off() -> None:
    """A non-finite norm is reported as one, and the next finite gradient is clipped as ever."""
    net = linear()
    optimizer = NetworkOptimizer(trainable(net), AdamWConfig(clip_norm=1.0), LRScheduleConfig(), 1)
    net.weight.grad, net.bias.grad = torch.full((2, 3), float("inf")), torch.zeros(2)
    assert not math.isfinite(optimizer.clip())
    net.weight.grad = torch.full((2, 3), 100.0)
    optimizer.clip()
    assert net.weight.grad.norm() == pytest.approx(1.0, rel=1e-4)


def test_muon_takes_the_hidden_matrices_and_orthogonalises_their_update() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    config = MuonConfig(lr=1e-3, muon_lr=0.1, momentum=0.0, clip_norm=None)
    optimizer = NetworkOptimizer(trainable(net), config, LRScheduleConfig(), 1, matrices=["0.weight"])
    assert set(optimizer.names_of("muon")) == {"0.weight"}
    assert set(optimizer.names_of("adamw")) == {"1.weight", "1.bias"}
    before = net[0].weight.detach().clone()
    net(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    singular = torch.linalg.svdvals((before - net[0].weight.detach()) / 0.1)
    gradient = torch.linalg.svdvals(net[0].weight.grad)
    assert gradient.max() / gradient.median() > 2  # the gradient is far from orthogonal, its update is near it
    assert singular.max() < 1.3
    assert singular.median() > 0.6


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_muon_is_torchs(shape: tuple[int, int]) -> None:
    """Two updates, with momentum and decay: in bf16 torch's own weights, in fp32 they but for the rounding."""
    start, gradients = torch.randn(shape), torch.randn(2, *shape)

    def moved(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Tensor:
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        return p.detach() - start

    p, q, r = (nn.Parameter(start.clone()) for _ in range(3))
    theirs = moved(torch.optim.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.01), p)
    bf16 = moved(Muon([q], 0.1, 0.9, 0.01, torch.bfloat16), q)
    fp32 = moved(Muon([r], 0.1, 0.9, 0.01, torch.float32), r)
    assert (bf16 - theirs).norm() < 1e-3 * theirs.norm()
    assert 0 < (fp32 - theirs).norm() < 0.02 * theirs.norm()


def test_a_loss_that_reaches_no_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        NetworkOptimizer(trainable(linear()), AdamWConfig(), LRScheduleConfig(), 1).clip()


def test_an_adapter_of_matrices_alone_is_all_muons() -> None:
    made = MuonConfig().make([], [torch.nn.Parameter(torch.ones(2, 3))], torch.float32)
    assert list(made) == ["muon"]


def stepped(optimizer: NetworkOptimizer, updates: int) -> None:
    for _ in range(updates):
        for number, p in enumerate(optimizer.parameters):
            p.grad = torch.full_like(p, 1.0 + number + optimizer.updates)
        optimizer.step()


def resumed(optimizer: NetworkOptimizer, saved: NetworkOptimizer) -> None:
    """As trainer/state.py does, without the files."""
    for kind, mine in optimizer.optimizers.items():
        tensors, rest = flatten_optimizer(saved.optimizers[kind], saved.names_of(kind).items())
        layout = {name: Entry(t.dtype, tuple(t.shape), []) for name, t in tensors.items()}
        for name, slot in restore_optimizer(mine, optimizer.names_of(kind).items(), layout, rest).items():
            slot.copy_(tensors[name])
    optimizer.apply_config()
    optimizer.fit_state()
    optimizer.updates = saved.updates


OTHER: dict[str, Any] = {
    "lr": 0.3, "clip_norm": 2.0, "clip_value": 1.0, "betas": [0.9, 0.99], "eps": 1e-3, "weight_decay": 0.2,
    "muon_lr": 0.5, "momentum": 0.5, "muon_weight_decay": 0.3,
}  # fmt: skip
FIRST: dict[str, Any] = {"clip_norm": None}
SETTINGS = [
    (kind, field.name)
    for kind, config in optimizers().items()
    for field in fields(config)
    if field.name != "kind"  # refused by name: trainer/state.py
]


@pytest.mark.parametrize(("kind", "name"), SETTINGS)
@pytest.mark.parametrize("back", [False, True])
def test_every_setting_may_change_on_resume(kind: str, name: str, back: bool) -> None:
    """The state is that of the settings: nothing is kept for others, and what they need is there."""
    settings = [optimizers()[kind](**FIRST), optimizers()[kind](**{**FIRST, name: OTHER[name]})]
    before, after = reversed(settings) if back else settings
    nets = [nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2)) for _ in range(3)]
    saved, mine, fresh = (
        NetworkOptimizer(trainable(net), config, LRScheduleConfig(), 9, ["0.weight"])
        for net, config in zip(nets, (before, after, after), strict=True)
    )
    stepped(saved, 2)
    resumed(mine, saved)
    stepped(mine, 1)
    stepped(fresh, 1)
    for key, optimizer in mine.optimizers.items():
        (group,), (wanted,) = optimizer.param_groups, fresh.optimizers[key].param_groups
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in wanted.items() if k != "params"}
        for parameter, twin in zip(group["params"], wanted["params"], strict=True):
            assert optimizer.state[parameter].keys() == fresh.optimizers[key].state[twin].keys()


def test_a_first_moment_that_was_not_kept_begins_at_zero() -> None:
    nets = [nn.Linear(3, 2) for _ in range(3)]
    configs = (AdamWConfig(), AdamWConfig(betas=[0.9, 0.999]), AdamWConfig())
    saved, with_moment, again = (
        NetworkOptimizer(trainable(net), config, LRScheduleConfig(), 9)
        for net, config in zip(nets, configs, strict=True)
    )
    stepped(saved, 3)
    resumed(with_moment, saved)
    stepped(with_moment, 1)
    weight = nets[1].weight
    state = with_moment.optimizers["adamw"].state[weight]
    assert weight.grad is not None
    torch.testing.assert_close(state["exp_avg"], 0.1 * weight.grad)
    assert state["step"] == 4
    resumed(again, with_moment)
    assert "exp_avg" not in again.optimizers["adamw"].state[nets[2].weight]  # it would be old when it is next wanted
