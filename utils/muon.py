"""Muon for whole and for sharded matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.distributed import full, like, local

# a x + b x^3 + c x^5, five times over, takes every singular value from (0, 1] near 1 (Jordan et al. 2024)
COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Muon(torch.optim.Muon):
    """torch.optim.Muon's update (Jordan et al. 2024: Nesterov momentum, orthogonalised, times max(1, rows/columns)^0.5)
    of sharded matrices too, and on a CPU in fp32.

    A singular value needs the whole matrix. Momentum lies in shards as the weight does; what it gives is gathered, one
    matrix at a time, orthogonalised on every rank alike, and each rank takes its own rows.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum: Tensor = state["momentum_buffer"]
                local(momentum).lerp_(local(p.grad), 1 - group["momentum"])
                update = orthogonal(full(p.grad.lerp(momentum, group["momentum"])))
                rows, columns = p.shape
                local(p).mul_(1 - group["lr"] * group["weight_decay"])
                local(p).add_(local(like(update.to(p.dtype), p)), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Near the orthogonal matrix closest to `matrix` [rows, columns]: same singular vectors, values about 0.7 to 1.2.

    In bf16 on a GPU, as published; in fp32 on a CPU, of which few have bf16 arithmetic.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    if wide := matrix.shape[0] > matrix.shape[1]:
        x = x.T  # the smaller side is squared
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if wide else x
