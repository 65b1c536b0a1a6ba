"""The difference of two networks' weights as an adapter: of each matrix the best factors of a rank, by SVD.

The best approximation of rank r keeps the r largest singular values, and what it lacks has the norm of the others
(Eckart and Young, 1936). So one decomposition tells the error of every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.weights import State, Weights, misfits

RANKS = (4, 8, 16, 32, 64, 128)  # of the table


@dataclass
class Extraction:
    """What an adapter holds of the difference between two networks. Errors are relative, in the Frobenius norm.

    rank: of the adapter.
    full: the rank that holds every matrix.
    state: factors, `blocks.0.self_attn.q.lora_A.weight`, with alpha = rank; matrices that are the same have none.
    differences: of the parameters that are no matrices, where they differ: biases, norms, modulations.
    tails: by rank, the sum of all squared singular values that this rank leaves out, over all matrices.
    total: the same of rank 0.
    left: what the factors, as they are stored, leave of the matrices, squared.
    others: the squared norm of `differences`.
    """

    rank: int
    full: int
    state: State = field(default_factory=dict)
    differences: State = field(default_factory=dict)
    tails: dict[int, float] = field(default_factory=dict)
    total: float = 0.0
    left: float = 0.0
    others: float = 0.0

    def error(self, rank: int) -> float:
        """Of the matrices, at one of the ranks in `tails`."""
        return math.sqrt(self.tails[rank] / self.total)

    @property
    def stored_error(self) -> float:
        """Of the matrices, with the factors rounded to what they are stored in."""
        return math.sqrt(self.left / self.total)

    @property
    def share_of_others(self) -> float:
        """The norm of `differences`, of the norm of the whole change: the error of an adapter that holds all matrices
        exactly and nothing else."""
        return math.sqrt(self.others / (self.total + self.others))


def extract(
    weights: Weights,
    base: Weights,
    rank: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    done: Callable[[int], None] | None = None,
) -> Extraction:
    """`weights` minus `base`, one parameter in memory at a time.

    weights, base: of one geometry.
    rank: of the adapter; at most the full one is taken.
    dtype: what the factors are rounded to. The decomposition is in fp32.
    device: where it is computed.
    done: is told how many parameters are done.
    Raises ValueError, one line, for weights of two geometries, and for weights that are the same.
    """
    if found := misfits(weights.shapes, base.shapes):
        raise ValueError(f"these weights and the base are not of one geometry: {found}")
    full = max(min(_sides(shape)) for name, shape in weights.shapes.items() if is_matrix(name, shape))
    out = Extraction(min(rank, full), full)
    out.tails = dict.fromkeys(sorted({r for r in (*RANKS, rank) if r < full} | {full}), 0.0)
    for number, (name, shape) in enumerate(weights.shapes.items(), 1):
        change = _read(weights, name).to(device, torch.float32) - _read(base, name).to(device, torch.float32)
        if change.any():
            if is_matrix(name, shape):
                _add_matrix(out, name, change, dtype)
            else:
                out.others += _square(change)
                out.differences[name] = change.to("cpu", dtype)
        if done is not None:
            done(number)
    if not out.state:
        raise ValueError("no matrix of these weights differs from the base's: there is nothing to extract")
    return out


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a linear layer's or a convolution's, beside which an adapter may lie."""
    return name.endswith(".weight") and len(shape) >= 2


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _read(weights: Weights, name: str) -> Tensor:
    ((_, value),) = weights.read([name])
    return value


def _square(value: Tensor) -> float:
    return float(value.double().square().sum())


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T, the last of a wide matrix by its transpose: LAPACK takes four times as long for it as it is."""
    if matrix.shape[0] >= matrix.shape[1]:
        return torch.linalg.svd(matrix, full_matrices=False)  # type: ignore[return-value]
    v, s, uh = torch.linalg.svd(matrix.T, full_matrices=False)
    return uh.T, s, v.T


def _add_matrix(out: Extraction, name: str, change: Tensor, dtype: torch.dtype) -> None:
    """Factors share each singular value: up = U sqrt(S), down = sqrt(S) V^T. Matrices of fewer sides than the rank get
    zeros, so that all have one rank, as PEFT's files want it."""
    matrix, rank = change.flatten(1), out.rank
    u, s, vh = _svd(matrix)
    squares = s.double().square()
    out.total += float(squares.sum())
    for other in out.tails:
        out.tails[other] += float(squares[other:].sum())
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).to(dtype), (root[:, None] * vh[:rank]).to(dtype)
    out.left += _square(matrix - up.float() @ down.float())
    ups, downs = matrix.new_zeros(len(up), rank, dtype=dtype), matrix.new_zeros(rank, down.shape[1], dtype=dtype)
    ups[:, : up.shape[1]], downs[: len(down)] = up, down
    module = name.removesuffix(".weight")
    out.state[f"{module}.lora_A.weight"] = downs.view(rank, *change.shape[1:]).cpu()
    out.state[f"{module}.lora_B.weight"] = ups.view(len(up), rank, *(1 for _ in change.shape[2:])).cpu()
