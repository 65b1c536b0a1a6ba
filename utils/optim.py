"""Optimizers, learning-rate schedules, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from utils.distributed import full, local
from utils.muon import Muon


class OptimizerKind(StrEnum):
    adamw = "adamw"
    muon = "muon"  # for the blocks' matrices, with AdamW for the rest


class LRScheduleKind(StrEnum):
    constant = "constant"
    linear = "linear"  # decay to the floor
    cosine = "cosine"  # likewise


@dataclass
class OptimizerConfig:
    """What updates a network's weights, and how gradients are clipped before.

    kind: the optimizer.
    lr: AdamW's peak learning rate.
    betas: AdamW's decay of the first and the second moment; a first of 0 keeps no first moment in memory.
    eps: AdamW's addend to the root of the second moment.
    weight_decay: AdamW's decoupled weight decay.
    muon_lr: Muon's peak learning rate (Jordan et al. 2024).
    momentum: Muon's momentum.
    muon_weight_decay: Muon's decoupled weight decay.
    clip_norm: gradients are scaled down to this global norm, null for none; not together with clip_value.
    clip_value: gradients are clipped to this by element, null for none; not together with clip_norm.
    """

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 2e-6
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    muon_lr: float = 0.02
    momentum: float = 0.95
    muon_weight_decay: float = 0.0
    clip_norm: float | None = 10.0
    clip_value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in list(OptimizerKind):
            raise ValueError(f"kind '{self.kind}' is unknown: choose {', '.join(OptimizerKind)}")
        if self.lr <= 0 or self.muon_lr <= 0:
            raise ValueError(f"lr and muon_lr must be positive, got lr {self.lr} and muon_lr {self.muon_lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value are both set: set one of them to null")
        for name, clip in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if clip is not None and clip <= 0:
                raise ValueError(f"{name} must be positive, or null for none, got {clip}")


@dataclass
class LRScheduleConfig:
    """The learning rate as a share of its peak, counted in the network's updates.

    kind: what the rate does after the warm-up.
    warmup_steps: updates of linear warm-up.
    decay_start: share of the run at which the decay begins.
    floor: share of the peak where the decay ends.
    """

    kind: LRScheduleKind = LRScheduleKind.constant
    warmup_steps: int = 0
    decay_start: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in list(LRScheduleKind):
            raise ValueError(f"kind '{self.kind}' is unknown: choose {', '.join(LRScheduleKind)}")
        if self.warmup_steps < 0 or not 0 <= self.decay_start < 1 or not 0 <= self.floor <= 1:
            raise ValueError(
                f"warmup_steps must be >= 0, decay_start in [0, 1), floor in [0, 1], got {self.warmup_steps}, "
                f"{self.decay_start}, {self.floor}"
            )

    def factor(self, update: int, total: int) -> float:
        """Share of the peak rate at update number `update` (from 0) of `total`. A pure function: nothing to resume."""
        warmup = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == LRScheduleKind.constant:
            return warmup
        start = max(self.decay_start * total, self.warmup_steps)
        progress = min(max((update - start) / max(total - start, 1), 0.0), 1.0)
        decay = 1 - progress if self.kind == LRScheduleKind.linear else 0.5 * (1 + math.cos(math.pi * progress))
        return warmup * (self.floor + (1 - self.floor) * decay)


@dataclass
class TrainedConfig:
    """How one trained network is updated."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)


class MomentumFreeAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) at beta1 = 0, as distribution matching is run: the same update, bit for
    bit, without the first moment, which is the gradient itself. One fp32 state a parameter instead of two."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, beta2: float, eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.0, beta2), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, (_, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["exp_avg_sq"] = torch.tensor(0.0), torch.zeros_like(p)
                state["step"] += 1
                # all of it is by element: of a sharded parameter each rank updates its own part
                weight, gradient, square = local(p), local(p.grad), local(state["exp_avg_sq"])
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                correction = (1 - beta2 ** state["step"].item()) ** 0.5
                weight.mul_(1 - lr * group["weight_decay"])
                weight.addcdiv_(gradient, (square.sqrt() / correction).add_(group["eps"]), value=-lr)


def adamw(params: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as configured; without first moments where beta1 = 0 makes them superfluous."""
    beta1, beta2 = config.betas
    if beta1 == 0:
        return MomentumFreeAdamW(params, config.lr, beta2, config.eps, config.weight_decay)
    return torch.optim.AdamW(
        params, lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay
    )


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


class NetworkOptimizer:
    """All that updates one network: its optimizers, its schedule, its clipping.

    named: what it updates, by the names under which it is kept. matrices: names of those that Muon may take; the others
    are AdamW's. precision: of Muon's products (fp32: None).
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        schedule: LRScheduleConfig,
        total_updates: int,
        matrices: Iterable[str] = (),
        precision: torch.dtype | None = None,
    ) -> None:
        self.config, self.schedule, self.total = config, schedule, total_updates
        self.named = dict(named)
        hidden = set(matrices) if config.kind == OptimizerKind.muon else set()
        rest = [p for name, p in self.named.items() if name not in hidden]
        self.optimizers: dict[str, torch.optim.Optimizer] = {"adamw": adamw(rest, config)}
        if hidden:
            self.optimizers["muon"] = Muon(
                [p for name, p in self.named.items() if name in hidden],
                lr=config.muon_lr,
                momentum=config.momentum,
                weight_decay=config.muon_weight_decay,
                precision=precision or torch.float32,
            )
        self.peak = {"adamw": config.lr, "muon": config.muon_lr}
        self.updates = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def names_of(self, kind: str) -> dict[str, nn.Parameter]:
        """The parameters of one of the optimizers, by name."""
        held = {id(p) for group in self.optimizers[kind].param_groups for p in group["params"]}
        return {name: p for name, p in self.named.items() if id(p) in held}

    def clip(self) -> Tensor:
        """Clips as configured and returns the gradient's global norm before that, a scalar tensor.

        By a norm that is not finite nothing is clipped: all would become NaN, and nobody could tell where it began.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError("no parameter has a gradient: the loss does not reach this network")
        norm = full(torch.nn.utils.get_total_norm(gradients))
        if not bool(norm.isfinite()):
            return norm
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        elif self.config.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.config.clip_value)
        return norm

    def step(self) -> float:
        """One update at the scheduled rate; returns the AdamW rate used."""
        rate = self.set_rates()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.updates += 1
        return rate

    def set_rates(self) -> float:
        """Gives the optimizers the rates of the coming update; returns AdamW's."""
        factor = self.schedule.factor(self.updates, self.total)
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peak[kind] * factor
        return self.peak["adamw"] * factor

    def apply_config(self) -> None:
        """Puts the config's betas, eps, decay and momentum back, after a checkpoint brought its own: as with the rate,
        what the config says holds."""
        c = self.config
        options: dict[str, dict[str, object]] = {
            "adamw": {"betas": (c.betas[0], c.betas[1]), "eps": c.eps, "weight_decay": c.weight_decay},
            "muon": {"momentum": c.momentum, "weight_decay": c.muon_weight_decay},
        }
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group.update(options[kind])

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None
