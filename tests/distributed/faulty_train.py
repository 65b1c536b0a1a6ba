"""`train.py` with one rank that misbehaves: FAULT names how, NOTES a folder in which each rank writes what it saw."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

import train
import trainer.base
import trainer.run
from model.types import LossOutput
from trainer.networks import Trained
from trainer.update import Update
from utils.cli import run_cli
from utils.run_lock import LockTimes

FAULT, RANK, WORLD = os.environ["FAULT"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NOTES = Path(os.environ["NOTES"])
ODD = WORLD - 1
NAN_LOSS, NAN_GRADIENT = (1, 5, 6), 3


def misbehave(step: int) -> None:
    if RANK != ODD or step != 2:
        return
    if FAULT == "absent":
        time.sleep(600)
    if FAULT == "killed" or (FAULT == "killed once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
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


class FaultyUpdate(Update):
    def __init__(self, trained: Trained, *others: Any) -> None:
        self.before = digest(trained)
        super().__init__(trained, *others)
        misbehave(self.iteration)

    def backward(self, output: LossOutput) -> None:
        super().backward(spoilt(output, self.iteration, self.trained))

    def step(self) -> dict[str, float]:
        metrics = super().step()
        note(f"{self.iteration} {self.before} {digest(self.trained)}")
        return metrics


trainer.base.Update = FaultyUpdate  # type: ignore[misc, attr-defined]
note(str(os.getpid()))
if FAULT == "command" and RANK == ODD:
    sys.argv += ["seed=1", "--max_steps", "6", "--resume", "never"]
if FAULT == "late" and RANK == ODD:
    time.sleep(4)
if FAULT == "disks":  # relative paths lead to a disk of each node
    os.chdir(NOTES / f"disk{RANK}")
    trainer.run.LOCK_TIMES = LockTimes(sight=0.5)
run_cli(train.main)
