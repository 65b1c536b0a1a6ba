"""`train.py` with one rank that misbehaves: FAULT names how, NOTES a folder in which each rank writes what it saw."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

import train
from model.types import LossOutput
from trainer.base import Trainer
from trainer.micro_batch import MicroBatch
from trainer.networks import Trained
from utils.cli import run_cli

FAULT, RANK, WORLD = os.environ["FAULT"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NOTES = Path(os.environ["NOTES"])
ODD = WORLD - 1
NAN_LOSS, NAN_GRADIENT = (1, 5, 6), 3


def misbehave(step: int) -> None:
    if RANK != ODD or step != 2:
        return
    if FAULT == "absent":
        time.sleep(600)
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def spoilt(output: LossOutput, step: int, trained: Trained) -> LossOutput:
    if RANK != ODD or FAULT != "nan":
        return output
    if step in NAN_LOSS:
        return LossOutput(output.loss * float("nan"), output.metrics)
    if step == NAN_GRADIENT:  # 0, but its derivative is 0 / 0
        return LossOutput(output.loss + (trained.net.head.head.bias.sum() * 0).sqrt(), output.metrics)
    return output


def digest(trained: Trained) -> str:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trained.net.parameters()]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in whole)).hexdigest()


def note(text: str) -> None:
    with (NOTES / f"rank{RANK}.txt").open("a") as file:
        file.write(text + "\n")


healthy = Trainer.update


def update(
    self: Trainer, trained: Trained, batch: list[MicroBatch], loss_of: Callable[[MicroBatch], LossOutput], *beside: Any
) -> dict[str, Any]:
    before = digest(trained)
    misbehave(self.step)
    metrics = healthy(self, trained, batch, lambda micro: spoilt(loss_of(micro), self.step, trained), *beside)
    note(f"{self.step} {before} {digest(trained)}")
    return metrics


Trainer.update = update  # type: ignore[method-assign]
note(str(os.getpid()))
if FAULT == "config" and RANK == ODD:
    sys.argv.append("seed=1")
run_cli(train.main)
