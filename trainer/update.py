"""One update of a network: micro-batches add their gradients, then an optimizer step is taken, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.types import LossOutput
from trainer.ended import Ended
from trainer.micro_batch import MicroBatch
from trainer.networks import Trained
from trainer.observer import TrainerObserver
from trainer.reduction import Reduced
from utils import activity
from utils.finite import FiniteCheck
from utils.logging import warn


class Skips:
    """Updates that were not taken because a number was not finite.

    total: how many since the run began.
    in_a_row: for each network, how many since its last update that was taken.
    ended: why the run must end: `limit` in a row; None while it may go on.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row: dict[str, int] = {}
        self.ended: Ended | None = None

    @property
    def is_in_streak(self) -> bool:
        """Whether the last update of some network was not taken, or the run ends because of such updates."""
        return self.ended is not None or any(self.in_a_row.values())

    def accepts(self, name: str, problem: str | None, step: int) -> bool:
        """Whether the update of network `name` is taken. problem: what is not finite and on which rank, the same text
        on all ranks; None when all numbers are finite."""
        if problem is None:
            self.in_a_row[name] = 0
            return True
        self.total += 1
        self.in_a_row[name] = count = self.in_a_row.get(name, 0) + 1
        warn(f"step {step}: {name}: not finite: {problem}; update skipped")
        if count >= self.limit:
            # the iteration is finished first, so that the checkpoint is of a whole one
            self.ended = Ended(
                f"{count} updates of {name} in a row were not finite (last: {problem} at step {step})",
                "lower the learning rate or look at the data",
            )
            self.in_a_row[name] = 0
        return False


class Update:
    """An update of `trained`, and of what its loss trains beside it: all of them take their step, or none.

        for micro in update.over(batch):
            update.backward(loss(micro))
        metrics = update.step()

    trained: the network that the loss is logged under.
    beside: the other networks and heads that the loss trains.
    observer: is told where the update is.
    skips: counts the update if it is not taken.
    sequence: ranks that share a sample, and count once in what is logged.
    iteration: the run's iteration, for messages.
    """

    def __init__(
        self,
        trained: Trained,
        beside: Sequence[Trained],
        observer: TrainerObserver,
        skips: Skips,
        sequence: int,
        iteration: int,
    ) -> None:
        self.trained, self.beside, self.group = trained, beside, [trained, *beside]
        self.observer, self.skips, self.sequence, self.iteration = observer, skips, sequence, iteration
        self.metrics = Reduced()
        self.loss = 0.0
        self.micro: MicroBatch | None = None
        self.is_last = False
        observer.update_begins(trained.name)
        for member in self.group:
            member.engine.zero_grad()

    def over(self, batch: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in turn. Each of them wants one call of `backward`."""
        for number, micro in enumerate(batch, 1):
            activity.mark(f"{self.trained.name} loss and backward")
            self.observer.forward_begins(self.trained.name)
            self.micro, self.is_last = micro, number == len(batch)
            yield micro
            assert self.micro is None, "a micro-batch without a backward"

    def backward(self, output: LossOutput) -> None:
        """Adds the gradient of the current micro-batch's loss, by its weight in the global batch."""
        assert self.micro is not None
        name, weight, last = self.trained.name, self.micro.weight, self.is_last
        self.micro = None
        self.observer.backward_begins(name)
        for member in self.beside:
            member.engine.before_backward(last=last)
        self.trained.engine.backward(output.loss * weight, last=last)
        self.observer.backward_ended(name)
        for member in self.beside:
            member.engine.after_backward(last=last)
        self.metrics.add(output, weight)
        self.loss += float(output.loss.detach())

    def step(self) -> dict[str, float]:
        """Clips and takes the optimizer steps and averages, unless a number is not finite on any rank.

        Returns what to log: the losses' metrics over the global batch, and for each member `grad_norm` and `lr` (the
        latter only of a step that was taken).
        """
        name = self.trained.name
        activity.mark(f"{name} update")
        parameters = {f"{member.name}.{key}": p for member in self.beside for key, p in member.optimizer.named.items()}
        check = FiniteCheck(self.metrics.values | {"loss": self.loss}, {**self.trained.optimizer.named, **parameters})
        metrics = {f"{name}/{key}": value for key, value in self.metrics.over_ranks(self.sequence).items()}
        norms, clipped = {}, 0.0
        for member in self.group:
            self.observer.step_begins(member.name)
            norms[member.name] = float(member.engine.clip())
            clipped += member.engine.optimizer.clipped(norms[member.name])
        metrics |= {f"{key}/grad_norm": norm for key, norm in norms.items()}
        if self.skips.accepts(name, check.agree(sum(norms.values()), clipped), self.iteration):
            for member in self.group:
                metrics[f"{member.name}/lr"] = member.engine.step()
                if member.ema is not None:
                    member.ema.update(member.optimizer.updates)
        for member in self.group:
            member.engine.zero_grad()
        return metrics
