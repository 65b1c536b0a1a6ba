"""Gradient through passes that were already made: their outputs are known, so only backward computes.

A causal rollout makes its passes block by block, because each needs the one before; their gradients do not need each
other. So the exit passes run without gradient and leave a `Trace`, and one pass over all their frames is put into the
graph afterwards. It computes nothing but the embeddings and the head; in backward each layer is recomputed once for all
frames, as checkpointing would, but sees its weights once instead of once a block: one set of large products, one
gradient to accumulate, and, where weights are sharded, one gather and one reduction.

B batch  L tokens  N heads  D head dim  d model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class TracedPass:
    """A pass that was made without gradient, for later.

    x: latents [B, F, C, H, W] that went in.
    sigma: their noise level [B].
    rope: table of this rank's tokens.
    tokens: how many of all ranks.
    joins: per layer, the context that they saw.
    outputs: per layer, this rank's tokens after it.
    """

    x: Tensor
    sigma: Tensor
    rope: Tensor
    tokens: int
    joins: list[Join | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class Trace:
    """The passes of a rollout that will carry gradient, in order."""

    passes: list[TracedPass] = field(default_factory=list)

    def start(self, x: Tensor, sigma: Tensor, rope: Tensor, tokens: int) -> TracedPass:
        self.passes.append(TracedPass(x, sigma, rope, tokens))
        return self.passes[-1]

    @property
    def x(self) -> Tensor:
        """All latents that went in [B, F, C, H, W], along frames."""
        return torch.cat([traced.x for traced in self.passes], 1)

    @property
    def sigma(self) -> Tensor:
        """Their noise levels [B, F]."""
        return torch.cat([traced.sigma[:, None].expand(-1, traced.x.shape[1]) for traced in self.passes], 1)

    @property
    def rope(self) -> Tensor:
        return torch.cat([traced.rope for traced in self.passes], 1)

    def joins(self, layer: int) -> list[tuple[int, Join | None]]:
        """Per pass: its number of tokens on all ranks, and its context at this layer."""
        return [(traced.tokens, traced.joins[layer]) for traced in self.passes]

    def output(self, layer: int) -> Tensor:
        """Tokens [B, L, d] after this layer."""
        return torch.cat([traced.outputs[layer] for traced in self.passes], 1)


class _Known(torch.autograd.Function):
    """y = run(*inputs; weights) where y is known: backward recomputes it with gradient."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], known: list[Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.count = run, count
        ctx.weights = tensors[count:]
        ctx.save_for_backward(*tensors[:count])
        kind = tensors[0].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return known.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        kind, dtype, enabled = ctx.autocast
        needed = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=False)]
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
            again = ctx.run(*inputs)
        wanted = [t for t, n in zip((*inputs, *ctx.weights), needed, strict=True) if n]
        found = iter(torch.autograd.grad(again, wanted, gradient))
        return None, None, None, *(next(found) if n else None for n in needed)


@torch.compiler.disable  # what it runs may be compiled
def known_output(
    run: Callable[..., Tensor], known: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """`run(*inputs)`, which is `known`, with its gradient in `inputs` and in `weights`, which `run` uses as they are.

    Nothing runs until backward. Every weight given must take part in `run`.
    """
    return _Known.apply(run, [known], len(inputs), *inputs, *weights)  # type: ignore[no-any-return]
