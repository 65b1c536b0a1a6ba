"""Muon (Jordan et al. 2024) for whole and for sharded matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils import distributed
from utils.distributed import full, like, local
from utils.limits import check_within
from utils.optim import Params
from utils.optimizers.adamw import AdamWConfig, adamw

# a x + b x^3 + c x^5, five times over, takes every singular value from (0, 1] near 1 (Jordan et al. 2024)
COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
AT_ONCE = 8  # whole matrices in memory at a time, at most


@dataclass
class MuonConfig(AdamWConfig):
    """Muon for the blocks' matrices, and AdamW, with `lr`, for the rest.

    muon_lr: Muon's peak learning rate (Jordan et al. 2024).
    momentum: Muon's momentum.
    muon_weight_decay: Muon's decoupled weight decay.
    """

    takes_matrices: ClassVar[bool] = True
    on_deepspeed: ClassVar[bool] = False

    kind: str = "muon"
    muon_lr: float = 0.02
    momentum: float = 0.95
    muon_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.muon_lr <= 0:
            raise ValueError(f"muon_lr must be positive, got {self.muon_lr}")
        check_within(self, momentum="[0, 1)", muon_weight_decay="[0, inf)")

    def make(self, params: Params, matrices: Params, precision: torch.dtype) -> dict[str, torch.optim.Optimizer]:
        # of an adapter every weight is a matrix
        made: dict[str, torch.optim.Optimizer] = {"adamw": adamw(params, self)} if params else {}
        if matrices:
            made["muon"] = Muon(matrices, self.muon_lr, self.momentum, self.muon_weight_decay, precision)
        return made

    def options(self) -> dict[str, dict[str, Any]]:
        muon = {"lr": self.muon_lr, "momentum": self.momentum, "weight_decay": self.muon_weight_decay}
        return {**super().options(), "muon": muon}


class Muon(torch.optim.Muon):
    """torch.optim.Muon's update (Jordan et al. 2024: Nesterov momentum, orthogonalised, times max(1, rows/columns)^0.5)
    of sharded matrices too, its products in `precision`.

    A singular value needs the whole matrix. Momentum lies in shards as the weight does; what it gives is gathered, some
    matrices at a time; each is orthogonalised on one rank, which tells the others, and every rank takes its own rows.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        precision: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            ready.sort(key=lambda p: p.numel())  # ranks that work side by side have as much to do
            ranks = distributed.world_size() if any(isinstance(p, DTensor) for p in ready) else 1
            size = min(ranks, AT_ONCE)
            for start in range(0, len(ready), size):
                some = ready[start : start + size]
                directions = [full(self._direction(p, group["momentum"])) for p in some]
                for p, update in zip(some, self._updates(directions, ranks), strict=True):
                    rows, columns = p.shape
                    local(p).mul_(1 - group["lr"] * group["weight_decay"])
                    local(p).add_(local(like(update, p)), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer: Tensor = state["momentum_buffer"]
        local(buffer).lerp_(local(p.grad), 1 - momentum)
        return p.grad.lerp(buffer, momentum)

    def _updates(self, directions: list[Tensor], ranks: int) -> list[Tensor]:
        """Each direction orthogonalised, in its own dtype: with several ranks the i-th by rank i."""
        if ranks == 1:
            return [orthogonal(x, self.precision) for x in directions]
        for owner, x in enumerate(directions):
            if owner == distributed.rank():
                x.copy_(orthogonal(x, self.precision))
        for owner, x in enumerate(directions):
            dist.broadcast(x, owner)
        return directions


def orthogonal(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """Near the orthogonal matrix closest to `matrix` [rows, columns]: singular vectors kept, values 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.to(precision)
    if tall := matrix.shape[0] > matrix.shape[1]:
        x = x.T  # the smaller side is squared
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
