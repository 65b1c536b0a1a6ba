"""Who is told where a trainer is within an iteration: nobody in a run, the planner in a plan."""

from __future__ import annotations

from trainer.micro_batch import MicroBatch


class TrainerObserver:
    """What `Trainer` calls at named points. Nothing here does anything; an observer overrides what it wants to know.

    An update is: `update_begins`; for each micro-batch `forward_begins`, `backward_begins`, `backward_ended`; then
    `step_begins` for each network that takes a step. name: of a trained network or of heads ("student", "critic" ...).
    """

    def chosen(self, batch: list[MicroBatch]) -> list[MicroBatch]:
        """Which micro-batches of a rank's batch are run, with which noise: all of them, with their own."""
        return batch

    def update_begins(self, name: str) -> None:
        """Before the gradients of the network `name` are cleared."""

    def forward_begins(self, name: str) -> None:
        """Before the loss of a micro-batch, which includes its rollout."""

    def backward_begins(self, name: str) -> None:
        """Between a micro-batch's loss and its backward."""

    def backward_ended(self, name: str) -> None:
        """After the engine's backward of a micro-batch: the gradients are as the next one finds them."""

    def step_begins(self, name: str) -> None:
        """Before `name`'s gradients are clipped; its optimizer step and its average follow."""
