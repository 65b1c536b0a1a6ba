"""AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from utils.distributed import local
from utils.limits import check_within
from utils.optim import OptimizerConfig, Params


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW.

    betas: AdamW's decay of the first and the second moment; a first of 0 keeps no first moment in memory.
    eps: AdamW's addend to the root of the second moment.
    weight_decay: AdamW's decoupled weight decay.
    """

    on_deepspeed: ClassVar[bool] = True

    kind: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        check_within(self, eps="[0, inf)", weight_decay="[0, inf)")

    def make(self, params: Params, matrices: Params, precision: torch.dtype) -> dict[str, torch.optim.Optimizer]:
        return {"adamw": adamw(params, self)}

    def options(self) -> dict[str, dict[str, Any]]:
        beta1, beta2 = self.betas
        decay = {"weight_decay": self.weight_decay}
        return {"adamw": {"lr": self.lr, "betas": (beta1, beta2), "eps": self.eps, **decay}}


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


def adamw(params: Params, config: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW as configured; without first moments where beta1 = 0 makes them superfluous."""
    beta1, beta2 = config.betas
    if beta1 == 0:
        return MomentumFreeAdamW(params, config.lr, beta2, config.eps, config.weight_decay)
    return torch.optim.AdamW(
        params, lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay
    )
