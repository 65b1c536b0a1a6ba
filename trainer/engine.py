"""What turns losses into updates of one network: backward, reduction over the ranks, clipping, the optimizer's step.

`Trainer.update` knows only this interface, so that another engine is another class.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from utils.optim import NetworkOptimizer
from utils.parallel.parallelize import kept_gathered, reshard


class Engine:
    """One process that holds all the weights. Other engines override what is different for them."""

    def __init__(self, net: nn.Module, optimizer: NetworkOptimizer) -> None:
        self.net, self.optimizer = net, optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`, this micro-batch's share of the global loss. last: of the update; after it the
        gradients are those of all ranks, summed."""
        loss.backward()

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
    """Shards: FSDP2 reduces within backward. Between micro-batches gradients stay unsharded on their rank, unless
    `sync_each`: then they are scattered each time, and only copies of the weights wait for the last."""

    def __init__(
        self, net: nn.Module, optimizer: NetworkOptimizer, *, keep_gathered: bool = False, sync_each: bool = False
    ) -> None:
        super().__init__(net, optimizer)
        self.keep_gathered, self.sync_each = keep_gathered, sync_each

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.net, FSDPModule)
        self.net.set_requires_gradient_sync(last or self.sync_each)
        self.net.set_requires_all_reduce(last)
        loss.backward()

    def step(self) -> float:
        rate = super().step()
        reshard(self.net)
        return rate

    def rollout(self) -> AbstractContextManager[None]:
        return kept_gathered(self.net, self.keep_gathered)
