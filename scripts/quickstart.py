"""`make quickstart`: from the teacher that ships to a causal few-step student, with videos, a table and a report.

The stages are trainings and commands that a user would type; `logs/quickstart/commands.txt` has them. Started again
after Ctrl-C, a kill or a failure, it goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

# nothing that imports the networks: each of its commands does, and it would only begin later
from scripts.stages import Runner, Stage, Stopped, Teller
from utils.cli import Parser, run_cli
from utils.errors import UserError
from utils.logging import read_jsonl
from utils.writing import write_text

TEACHER, CAUSAL_INIT, DMD = "teacher", "causal_init", "self_forcing_dmd"
TEACHER_ASSET = Path("assets/shapes_teacher")
RECIPES = Path("configs/shapes")
PROMPTS = RECIPES / "prompts.txt"
FIRST_RECIPE = Path("configs/wan2.1_1.3b/dmd_3step_lora.yaml")  # what one may do next
TEACHER_DETAILS = "teacher_details"
START = 8.0  # seconds until a training's first iteration
# seconds of each stage on two cores of an AMD EPYC without bf16 instructions
COSTS = {
    TEACHER: 510.0,
    TEACHER_DETAILS: 1600.0,
    "look": 15.0,
    CAUSAL_INIT: 58.0,
    DMD: 139.0,
    "report": 28.0,
}
# idle threads that spin would take the cores from each other's processes; glibc gives large blocks back to the system
# at once and pays for each page again
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1",
    "MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000",
}  # fmt: skip


@dataclass(frozen=True)
class Quickstart:
    """What was asked for, and where.

    root: of all that is written.
    count: videos judged a row of the table.
    from_scratch: whether the teacher is trained too.
    overrides: of all trainings, key=value.
    cores: of this machine, if it has no GPU; 0 with a GPU.
    """

    root: Path
    count: int
    from_scratch: bool
    overrides: tuple[str, ...]
    cores: int

    @property
    def teacher(self) -> Path:
        return self.root / TEACHER_DETAILS if self.from_scratch else TEACHER_ASSET

    @property
    def python(self) -> str:
        """As one would type it here."""
        path = Path(sys.executable)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

    def stages(self) -> list[Stage]:
        """In their order. Where there are two cores, videos of what is trained already are made beside a training."""
        stages = self._teacher()
        made_of = stages[-1].digest if stages else (TEACHER_ASSET / "training" / "record.json").read_text()
        stages.append(self._look(made_of))
        ahead = [self._report_command("--sample", *names) for names in ((TEACHER,), (TEACHER, CAUSAL_INIT))]
        if self.cores < 2:
            ahead = [[], []]
        stages.append(
            self._training(
                CAUSAL_INIT, "causal start by diffusion forcing", {"student": self.teacher}, made_of, beside=ahead[0]
            )
        )
        starts = {"student": self.root / CAUSAL_INIT, "teacher": self.teacher, "critic": self.teacher}
        title = "Self-Forcing + DMD: from many steps to two"
        stages.append(self._training(DMD, title, starts, stages[-1].digest, beside=ahead[1]))
        return [*stages, self._report(stages[-1].digest)]

    def _teacher(self) -> list[Stage]:
        if not self.from_scratch:
            return []
        first = self._training(TEACHER, "teacher: flow matching", {}, "")
        starts = {"student": self.root / TEACHER}
        return [first, self._training(TEACHER_DETAILS, "teacher: outlines", starts, first.digest)]

    def _training(
        self, name: str, title: str, starts: Mapping[str, Path], made_of: str, beside: Sequence[str] = ()
    ) -> Stage:
        """A recipe's training. starts: weights of each network; made_of: the stage's that made them."""
        recipe, run = RECIPES / f"{name}.yaml", self.root / name
        begun = [f"{network}.init={path}" for network, path in starts.items()]
        overrides = [*begun, "logging.tensorboard=false", *self.overrides]  # a package less to install
        arguments = ["--config_path", str(recipe), "--logdir", str(run), "--resume", "auto"]
        return Stage(
            name=name,
            title=title,
            cost=COSTS[name],
            command=[self.python, "train.py", *arguments, *overrides],
            beside=[beside] if beside else [],
            made_of=made_of + recipe.read_text(),
            fraction=lambda: steps_done(run),
            start=START,
            resumes_in=run,
        )

    def _look(self, made_of: str) -> Stage:
        out = self.root / "teacher_videos"
        source = ["--run", str(self.teacher)]
        if not self.from_scratch:
            source = ["--model", str(self.teacher), "--config_path", str(RECIPES / f"{TEACHER_DETAILS}.yaml")]
        files = ["--prompts", str(PROMPTS), "--format", "gif", "--out", str(out)]
        command = [self.python, "inference.py", *source, "--steps", "20", *files]
        title = "a first look: videos of the teacher in 20 steps"
        return Stage(
            "look", title, COSTS["look"], command, made_of=made_of + PROMPTS.read_text(), result=f"{out}/*.gif"
        )

    def _report_command(self, *more: str) -> list[str]:
        arguments = ["--root", str(self.root), "--teacher", str(self.teacher), "--count", str(self.count)]
        return [self.python, "-m", "scripts.report", *arguments, *more]

    def _report(self, made_of: str) -> Stage:
        title, result = "the table, and a report with videos", str(self.root / "report.html")
        return Stage("report", title, COSTS["report"], self._report_command(), made_of=made_of, result=result)


def steps_done(run: Path) -> float:
    """How much of a training is done, from 0 to 1, by its folder."""
    lines = read_jsonl(run / "metrics.jsonl")
    return int(lines[-1]["step"]) / _steps(run / "config.yaml") if lines else 0.0


@functools.cache
def _steps(config: Path) -> int:
    return int(OmegaConf.load(config).training.max_steps)


def next_commands(quickstart: Quickstart) -> str:
    """What to type after it."""
    run, python = quickstart.root / DMD, quickstart.python
    hardware = next(line for line in FIRST_RECIPE.read_text().splitlines() if line.startswith("# Hardware:"))
    needs = hardware.removeprefix("# Hardware:").split(":")[0].strip()
    return "\n".join([
        "next: a web page that shows videos while they are made",
        f"  {python} demo.py --run {run}",
        "your own prompt",
        f'  {python} inference.py --run {run} --prompt "a blue star moving up" --out star.mp4',
        f"the first real recipe, Wan2.1 1.3B; it needs {needs}, and this says what else is missing here",
        f"  {python} doctor.py {FIRST_RECIPE}",
    ])  # fmt: skip


def locked(root: Path) -> int:
    """A file of the folder, open and locked. Raises UserError if another quickstart has it."""
    root.mkdir(parents=True, exist_ok=True)
    file = os.open(root / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another quickstart is at work in {root}: wait for it, or end it") from None
    return file


def main() -> int:
    parser = Parser(prog="python -m scripts.quickstart", description="Distil the teacher of shapes, and show it.")
    parser.add_argument("--root", type=Path, default=Path("logs/quickstart"), help="folder of all that is written")
    parser.add_argument("--count", type=int, default=100, help="videos judged a row of the table")
    parser.add_argument("--from_scratch", action="store_true", help="train the teacher too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all trainings")
    args = parser.parse_args()
    if args.count < 2:
        raise UserError(f"--count {args.count}: a distance needs at least 2 videos")
    gpu = torch.cuda.is_available()
    quickstart = Quickstart(
        args.root, args.count, args.from_scratch, tuple(args.overrides), 0 if gpu else os.cpu_count() or 1
    )
    stages, teller = quickstart.stages(), Teller(sys.stdout)
    lock = locked(args.root)
    runner = Runner(stages, args.root, teller, ENVIRONMENT, lock)
    runner.check()
    write_text(args.root / "commands.txt", "".join(f"{shlex.join(stage.command)}\n" for stage in stages), "--root")
    try:
        runner.run()
    except Stopped as stopped:
        print("\nquickstart: stopped, and saved; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.number
    print((args.root / "table.txt").read_text())
    print(next_commands(quickstart))
    return 0


if __name__ == "__main__":
    run_cli(main)
