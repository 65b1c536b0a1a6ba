"""`make soak`: small runs that are killed over and over, on disks that fill, under clocks that jump, and go on.

Each run is trained without a break first. Then it is begun again in another folder and killed by -9 at random moments,
start-up and saves included, and started again with `--resume auto`, until it is complete. Its losses and its last
checkpoint must be those of the unbroken run, bit for bit. Prints its counts, and ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from planning.packages import before_torch

os.environ.update(before_torch())  # as the programs do

import torch

from tests.forked import PRELOAD
from tests.small import BRIEF, config, merged
from tests.soak.launch import Try, adopt_orphans
from utils import checkpoint
from utils.config import to_yaml
from utils.logging import read_jsonl

STEPS = 12
PATIENCE = 150.0  # seconds until a rank whose launcher or peers were killed must have ended
VICTIMS = ("a rank", "the launcher", "all at once")
RUN = merged(
    BRIEF,
    {
        "training": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1},
        "checkpoint": {"every": 2, "keep_last": 2},
    },
)


@dataclass
class Soak:
    """The counts, and what went wrong.

    kills: how often each victim was killed.
    counts: other things that happened.
    slowest: seconds from a kill until the last process was gone.
    faults: what must not be.
    """

    folder: Path
    draw: random.Random
    wanted: int
    kills: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def run(self, ranks: int, number: int) -> None:
        """One run from its beginning to its end."""
        whole, broken = (self.folder / f"{ranks}_{name}" for name in ("whole", f"broken_{number}"))
        if not whole.exists():
            began = time.monotonic()
            self.finish(ranks, whole)
            (whole / "seconds").write_text(str(time.monotonic() - began))
        seconds = float((whole / "seconds").read_text())
        lost = False
        while not is_complete(broken):
            if self.kills.total() >= self.wanted:
                self.finish(ranks, broken)
                break
            lost |= self.disturb(ranks, broken, seconds)
        self.compare(whole, broken, complete=not lost)
        self.counts["runs"] += 1
        shutil.rmtree(broken)

    def arguments(self, run: Path) -> list[str]:
        return ["--config_path", str(self.folder / "run.yaml"), "--logdir", str(run), "--resume", "auto"]

    def begin(self, ranks: int, run: Path) -> Try:
        number = self.counts["tries"]
        self.counts["tries"] += 1
        clock = self.draw.choice((0.0, -86400.0 * self.draw.random(), 3600.0 * self.draw.random()))
        self.counts["clocks set back or ahead"] += bool(clock)
        return Try(ranks, self.arguments(run), self.folder / f"codes_{number}", clock)

    def finish(self, ranks: int, run: Path) -> None:
        """Without a disturbance."""
        self.end(self.begin(ranks, run), "an undisturbed run", [0] * ranks)

    def end(self, attempt: Try, what: str, codes: list[int] | None = None) -> None:
        """Waits for the end, and looks at what was said."""
        began = time.monotonic()
        if not attempt.wait(PATIENCE if codes is None else 600):
            self.fault(f"{what}: processes {attempt.alive()} are still there after {PATIENCE:.0f} s")
            attempt.kill([attempt.launcher, *attempt.ranks])
            attempt.wait(10)
        if codes is None:
            self.slowest = max(self.slowest, time.monotonic() - began)
        found = attempt.exit_codes()
        if codes is not None and found != codes:
            self.fault(f"{what}: exit codes {found}:\n{attempt.said[-2000:]}")
        if unusual := [code for code in found if code not in (0, 2, 75, 128 + signal.SIGTERM)]:
            self.fault(f"{what}: exit codes {unusual}:\n{attempt.said[-2000:]}")
        if "Traceback" in attempt.said or "frame #" in attempt.said:
            self.fault(f"{what}: a traceback:\n{attempt.said[-3000:]}")
        attempt.close()

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT: {text}", flush=True)

    def disturb(self, ranks: int, run: Path, seconds: float) -> bool:
        """Starts it, and kills or fills at a random moment. Returns whether lines of its log may be lost."""
        attempt = self.begin(ranks, run)
        full = self.draw.random() < 0.15
        if attempt.wait(self.draw.uniform(0.0, seconds)):
            self.end(attempt, "a run that nobody killed", [0] * ranks)
        elif full:
            attempt.limit_files(self.draw.choice((0, 2000, 20000)))
            self.counts["disks that filled"] += 1
            attempt.wait(self.draw.uniform(0.0, 5.0))
            attempt.limit_files(resource.RLIM_INFINITY)
            self.end(attempt, "a disk that filled and recovered")
        else:
            victim = self.draw.choice(VICTIMS)
            pids = {"a rank": [self.draw.choice(attempt.ranks)], "the launcher": [attempt.launcher]}
            killed = attempt.kill(pids.get(victim, [attempt.launcher, *attempt.ranks]))
            self.kills[f"{victim} of {ranks}"] += bool(killed)
            self.end(attempt, f"{victim} of {ranks} was killed")
        if self.draw.random() < 0.3 and run.exists():  # as a clock that was set back leaves them
            for path in run.rglob("*"):
                os.utime(path, (0, self.draw.uniform(0, 2e9)))
        return full

    def compare(self, whole: Path, broken: Path, *, complete: bool) -> None:
        losses = [
            {line["step"]: {key: value for key, value in line.items() if "loss" in key} for line in read_jsonl(file)}
            for file in (whole / "metrics.jsonl", broken / "metrics.jsonl")
        ]
        steps = [line["step"] for line in read_jsonl(broken / "metrics.jsonl")]
        if len(set(steps)) != len(steps) or (complete and sorted(steps) != list(range(1, STEPS + 1))):
            self.fault(f"{broken.name}: the steps of its log are {steps}")
        for step in set(steps):
            for key, value in losses[1][step].items():
                self.counts["losses"] += 1
                if value != losses[0][step][key]:
                    self.counts["losses that differ"] += 1
                    self.fault(
                        f"{broken.name}: step {step} {key} is {value!r}, without a break {losses[0][step][key]!r}"
                    )
        mine, theirs = (checkpoint.latest(run / "checkpoints") for run in (broken, whole))
        assert mine is not None and theirs is not None
        for name in checkpoint.tensor_names(theirs):
            a, b = checkpoint.load_tensors(mine, name), checkpoint.load_tensors(theirs, name)
            if a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in b):
                self.fault(f"{broken.name}: {name} of the last checkpoint differs")


def is_complete(run: Path) -> bool:
    saved = checkpoint.latest(run / "checkpoints")
    return saved is not None and checkpoint.step_of(saved) == STEPS


def main(wanted: int, seed: int, ranks: list[int], folder: Path) -> int:
    """Kills `wanted` times. Returns the exit code."""
    for name in PRELOAD:  # what the ranks need is imported once, here
        importlib.import_module(name)
    adopt_orphans()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(to_yaml(config(RUN)))
    soak, began, number = Soak(folder, random.Random(seed), wanted), time.monotonic(), 0
    soak.counts.update({"losses": 0, "losses that differ": 0})
    while soak.kills.total() < wanted:
        soak.run(ranks[number % len(ranks)], number)
        number += 1
        print(f"{number} runs, {soak.kills.total()} kills, {len(soak.faults)} faults, "
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    print(f"kills: {soak.kills.total()} {dict(sorted(soak.kills.items()))}")
    print(", ".join(f"{name}: {count}" for name, count in soak.counts.items()))
    print(f"slowest end after a disturbance: {soak.slowest:.1f} s")
    print(f"faults: {len(soak.faults)}")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(asked.kills, asked.seed, asked.ranks, Path(made) / "soak"))
