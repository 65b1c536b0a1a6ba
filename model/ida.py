"""Implicit distribution alignment (SenseFlow, arXiv 2506.00523): the critic follows each update of the student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from utils.distributed import local, stored
from utils.optim import trainable
from utils.parallel.parallelize import reshard

KEEP = 0.97


class Alignment:
    """critic <- keep critic + (1 - keep) student, on the shards that this rank holds: nothing is gathered.

    Both networks (or adapters) are of one geometry and sharded alike. It has no state of its own.

    critic: the network that is pulled.
    student: the network that it is pulled towards.
    keep: the critic's share in [0, 1].
    critic_named, student_named: the parameters by the names under which they are kept; None for all that is trained.

    Raises ValueError where names or shapes differ, and unless keep is in [0, 1].
    """

    def __init__(
        self,
        critic: nn.Module,
        student: nn.Module,
        keep: float = KEEP,
        critic_named: Mapping[str, nn.Parameter] | None = None,
        student_named: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        if not 0 <= keep <= 1:
            raise ValueError(f"alignment keeps a share of the critic in [0, 1], got {keep}")
        targets = trainable(student) if student_named is None else student_named
        followers = trainable(critic) if critic_named is None else critic_named
        _check_alike(followers, targets)
        self.net, self.keep = critic, keep
        # held here: while a sharded network is gathered, it names other tensors its parameters
        self.pairs = [(stored(p), stored(targets[name])) for name, p in followers.items()]

    @torch.no_grad()
    def update(self) -> None:
        """After each update of the student."""
        reshard(self.net)
        critic = [local(p) for p, _ in self.pairs]
        student = [local(p).to(pulled.dtype) for (_, p), pulled in zip(self.pairs, critic, strict=True)]
        torch._foreach_lerp_(critic, student, 1 - self.keep)


def _check_alike(critic: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> None:
    """ValueError, naming the first difference, unless both have the same parameters of the same shapes."""
    cannot = "the critic cannot be pulled towards the student"
    for name in sorted(critic.keys() ^ student.keys()):
        owner, other = ("critic", "student") if name in critic else ("student", "critic")
        raise ValueError(f"{cannot}: '{name}' is trained in the {owner}, not in the {other}; give both one geometry")
    for name, value in critic.items():
        shapes = [list(getattr(p, "ds_shape", p.shape)) for p in (value, student[name])]  # whole ones, under ZeRO-3 too
        if shapes[0] != shapes[1]:
            raise ValueError(f"{cannot}: '{name}' is {shapes[0]} and {shapes[1]}; give both one geometry")
