"""Optimizers, learning-rate schedules, clipping.

A kind of optimizer is one file in utils/optimizers/ with a class derived from `OptimizerConfig`. Nothing else names it:
`optimizers` finds it by its file, and `optimizer.kind` in a YAML chooses it. docs/extending.md adds one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from utils.distributed import full
from utils.errors import UserError
from utils.fields import check_modes
from utils.found import Registry
from utils.variants import check_kind

Params = Sequence[nn.Parameter]


class LRScheduleKind(StrEnum):
    constant = "constant"
    linear = "linear"  # decay to the floor
    cosine = "cosine"  # likewise


@dataclass
class OptimizerConfig:
    """What updates a network's weights, and how gradients are clipped before.

    kind: the optimizer.
    lr: its peak learning rate.
    clip_norm: gradients are scaled down to this global norm, null for none; not together with clip_value.
    clip_value: gradients are clipped to this by element, null for none; not together with clip_norm.
    """

    # takes_matrices: whether it updates matrices as a whole, and is nothing for a network that has none
    # on_deepspeed: whether DeepSpeed's ZeRO can hold it, which sees weights and their state as flat parts
    takes_matrices: ClassVar[bool] = False
    on_deepspeed: ClassVar[bool] = False

    kind: str = "adamw"
    lr: float = 2e-6
    clip_norm: float | None = 10.0
    clip_value: float | None = None

    @classmethod
    def variants(cls) -> Mapping[str, type[OptimizerConfig]]:
        """The config of each kind."""
        return optimizers()

    def __post_init__(self) -> None:
        check_kind(self)
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value are both set: set one of them to null")
        for name, clip in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if clip is not None and clip <= 0:
                raise ValueError(f"{name} must be positive, or null for none, got {clip}")

    def make(self, params: Params, matrices: Params, precision: torch.dtype) -> dict[str, torch.optim.Optimizer]:
        """What updates a network, by the names under which checkpoints keep its state.

        params: all that is not in `matrices`.
        matrices: what an optimizer that takes matrices may update as a whole; empty for others.
        precision: of products of matrices.
        """
        raise NotImplementedError

    def options(self) -> dict[str, dict[str, Any]]:
        """Of each optimizer that `make` may give, by its name: "lr", its peak rate, and what else the config says."""
        raise NotImplementedError


_REGISTRY = Registry("utils.optimizers", OptimizerConfig, first="adamw")


def optimizers() -> Mapping[str, type[OptimizerConfig]]:
    """The configs of all optimizers by kind, AdamW first, for it is the default."""
    return _REGISTRY.kinds()


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
        check_modes(self)
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

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig.variants()["adamw"]())
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


class NetworkOptimizer:
    """All that updates one network: its optimizers, its schedule, its clipping.

    named: what it updates, by the names under which it is kept.
    matrices: names of those that an optimizer may update as a whole.
    precision: of products of matrices (fp32: None).
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
        self.matrices = set(matrices) if config.takes_matrices else set()
        inside = [p for name, p in self.named.items() if name in self.matrices]
        rest = [p for name, p in self.named.items() if name not in self.matrices]
        self.optimizers = config.make(rest, inside, precision or torch.float32)
        self.updates = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def names_of(self, kind: str) -> dict[str, nn.Parameter]:
        """The parameters of one of the optimizers, by name."""
        held = {id(p) for group in self.optimizers[kind].param_groups for p in group["params"]}
        return {name: p for name, p in self.named.items() if id(p) in held}

    def state_bytes(self) -> int:
        """Bytes of the state that the first update makes, over all ranks together. Nothing is computed."""
        states = [state for kind in self._first_states().values() for state in kind.values()]
        held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in held)

    def fit_state(self) -> set[str]:
        """Makes the state that a checkpoint brought that of the config's settings, which may be others than it was made
        with: what they keep beside it begins at 0, what they do not keep goes.

        Returns what went, as `<parameter>/<key>`. Raises UserError where what they need cannot begin at 0.
        """
        gone = set()
        for kind, wanted in self._first_states().items():
            for name, p in self.names_of(kind).items():
                state = self.optimizers[kind].state.get(p)
                if not state:
                    continue  # it had no gradient yet
                for key in [key for key in state if key not in wanted[name]]:
                    del state[key]
                    gone.add(f"{name}/{key}")
                for key in [key for key in wanted[name] if key not in state]:
                    like = wanted[name][key]
                    if not isinstance(like, Tensor) or like.shape != p.shape:
                        raise UserError(
                            f"the checkpoint has no {key} of {name}, which these settings of {self.config.kind} need: "
                            "resume with those of that run, or --resume never"
                        )
                    state[key] = torch.zeros_like(p, dtype=like.dtype, requires_grad=False)
        return gone

    def _first_states(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The state that the first update makes, on the device meta, by optimizer and parameter."""
        shapes = {
            name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for name, p in self.named.items()
        }
        twin = NetworkOptimizer(shapes, self.config, self.schedule, self.total, self.matrices)
        for p in twin.parameters:
            p.grad = torch.zeros_like(p)
        for optimizer in twin.optimizers.values():
            optimizer.step()
        return {
            kind: {name: dict(optimizer.state[p]) for name, p in twin.names_of(kind).items()}
            for kind, optimizer in twin.optimizers.items()
        }

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

    def clipped(self, norm: float) -> float:
        """The most that clipping leaves of a global norm; NaN where a bound is NaN, for then the gradients are too. The
        gradients are not read again for it."""
        bound, largest = self.config.clip_norm, self.config.clip_value
        if bound is not None:
            factor = bound / (norm + 1e-6)  # torch's and DeepSpeed's own
            return norm if factor > 1 else norm * factor
        return math.nan if largest is not None and math.isnan(largest) else norm

    def step(self) -> float:
        """One update; returns the scheduled rate of the config's `lr`."""
        rate = self.set_rates()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.updates += 1
        return rate

    def set_rates(self) -> float:
        """Gives the optimizers the rates of the coming update; returns that of the config's `lr`."""
        factor, options = self.schedule.factor(self.updates, self.total), self.config.options()
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = options[kind]["lr"] * factor
        return self.config.lr * factor

    def apply_config(self) -> None:
        """Puts what the config says of the optimizers back, after a checkpoint brought its own: as with the rate,
        what the config says holds."""
        options = self.config.options()
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group.update({key: value for key, value in options[kind].items() if key != "lr"})

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None
