"""What turns losses into updates of one network: backward, reduction over the ranks, clipping, the optimizer's step.

`trainer.update.Update` knows only this interface, so that another engine is another class.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from utils import distributed
from utils.optim import NetworkOptimizer
from utils.parallel.parallelize import kept_gathered, reshard


class Engine:
    """One process that holds all the weights. Other engines override what is different for them."""

    def __init__(self, net: nn.Module, optimizer: NetworkOptimizer) -> None:
        self.net, self.optimizer = net, optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`, this micro-batch's share of the global loss.

        last: this is the update's last micro-batch. After it the gradients are summed over all ranks.
        """
        self.before_backward(last=last)
        loss.backward()
        self.after_backward(last=last)

    def before_backward(self, *, last: bool) -> None:
        """Call this before a backward that another engine runs but that also fills this network's gradients."""

    def after_backward(self, *, last: bool) -> None:
        """Call this after such a backward."""

    def clip(self) -> Tensor:
        """Clips as configured; returns the global norm before that, a scalar that is the same on every rank."""
        return self.optimizer.clip()

    def step(self) -> float:
        """One update; returns the learning rate."""
        return self.optimizer.step()

    def rollout(self) -> AbstractContextManager[None]:
        """Around many passes in a row through weights that do not change."""
        return kept_gathered(self.net, False)


class FSDPEngine(Engine):
    """FSDP2 shards, reduced during backward.

    By default gradients stay unsharded between micro-batches. With `sync_each` they are scattered after each one.
    Either way replicas are summed after the last one only.
    """

    def __init__(
        self, net: nn.Module, optimizer: NetworkOptimizer, *, keep_gathered: bool = False, sync_each: bool = False
    ) -> None:
        super().__init__(net, optimizer)
        self.keep_gathered, self.sync_each = keep_gathered, sync_each

    def before_backward(self, *, last: bool) -> None:
        assert isinstance(self.net, FSDPModule)
        self.net.set_requires_gradient_sync(last or self.sync_each)
        self.net.set_requires_all_reduce(last)

    def step(self) -> float:
        rate = super().step()
        reshard(self.net)
        return rate

    def rollout(self) -> AbstractContextManager[None]:
        return kept_gathered(self.net, self.keep_gathered)


class ReplicatedEngine(Engine):
    """Weights that every rank holds whole: heads too small to shard. Ranks of a sequence group see the same sample,
    each all of it, and count once."""

    def __init__(self, net: nn.Module, optimizer: NetworkOptimizer, sequence: int) -> None:
        super().__init__(net, optimizer)
        self.sequence = sequence

    def after_backward(self, *, last: bool) -> None:
        if last:
            for p in self.optimizer.parameters:
                if p.grad is not None:
                    distributed.all_reduce_(p.grad).div_(self.sequence)
