"""Whether an update, or the weights, are finite on all ranks, and whose numbers are not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils import distributed
from utils.distributed import local


class FiniteCheck:
    """Whether an update may be taken, agreed by all ranks, and if not whose numbers spoilt it.

    Made before gradients are summed over ranks, from this rank's own numbers: a sum does not tell whose they were.
    Sharded gradients (DTensor) are summed by then, and a rank answers for its shard; its losses are always its own.
    ``agree`` costs one all-reduce of one number.
    """

    def __init__(self, losses: Mapping[str, float], named: Mapping[str, torch.nn.Parameter]) -> None:
        self.bad = [name for name, value in losses.items() if not math.isfinite(value)]
        self.named = named
        local = [p.grad for p in named.values() if p.grad is not None and not isinstance(p.grad, DTensor)]
        # read only if something is wrong: no waiting for a GPU here
        self.norm = torch.nn.utils.get_total_norm(local) if local and distributed.world_size() > 1 else None

    def agree(self, grad_norm: float, clipped_norm: float = 0.0) -> str | None:
        """None if all is finite on all ranks, else what is not, and on which ranks; the same on every rank.

        grad_norm: the global one. Gradients must be as they were summed, not yet clipped by a norm that is NaN.
        clipped_norm: that of the gradients as the optimizer will see them.
        """
        flag = float(bool(self.bad) or not math.isfinite(grad_norm + clipped_norm))
        if not distributed.all_reduce_scalars({"non_finite": flag}, "max")["non_finite"]:
            return None
        found = list(self.bad)
        if math.isfinite(grad_norm) and not math.isfinite(clipped_norm):
            return "; ".join([*found, "the gradient once it is clipped: look at clip_norm and clip_value"])
        innocent = self.norm is not None and bool(self.norm.isfinite())
        suspects = {name: p for name, p in self.named.items() if not innocent or isinstance(p.grad, DTensor)}
        if where := first_non_finite(suspects):
            found.append(f"gradient of {where}")
        texts = distributed.all_gather_text(", ".join(found))
        by_text: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            by_text.setdefault(text, []).append(rank)
        parts = [f"{text} on {distributed.ranks(numbers)}" for text, numbers in by_text.items() if text]
        return "; ".join(parts) or "the gradient's norm"


def first_non_finite(named: Mapping[str, torch.nn.Parameter]) -> str | None:
    """The first parameter whose gradient (of a sharded one: the part held here) has a NaN or infinity."""
    for name, p in named.items():
        if p.grad is not None and not bool(local(p.grad).isfinite().all()):
            return f"{name} (its shard)" if isinstance(p.grad, DTensor) else name
    return None


@torch.no_grad()
def first_ruined(groups: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first of these weights, as "group: name", whose norm in fp32 is not finite on some rank, and on which: a
    collective, the same text on every rank. None if all are sound.

    A weight so large that its square overflows counts too: no network computes with it.
    """
    mine = next((f"{group}: {name}" for group, of in groups.items() for name in of if not _is_sound(of[name])), "")
    if not distributed.all_reduce_scalars({"ruined": float(bool(mine))}, "max")["ruined"]:
        return None
    texts = distributed.all_gather_text(mine)
    first = next(text for text in texts if text)
    return f"{first} on {distributed.ranks([rank for rank, text in enumerate(texts) if text])}"


def _is_sound(weight: Tensor) -> bool:
    part = local(weight)
    return not part.is_floating_point() or bool(torch.linalg.vector_norm(part.float()).isfinite())
