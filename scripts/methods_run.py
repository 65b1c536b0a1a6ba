"""Training and judging one row of docs/methods.md, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.load import load_run
from configs.schema import RunConfig
from evaluation.toy_suite import evaluate_generator, evaluate_real, generate_all, judge_of
from generation.generator import Generator
from generation.sampling import Sampling, StudentChoice
from model.network import Expert
from scripts.methods_table import BY_KEY, Method
from scripts.report_samples import end_with_parent
from tasks.task import spread
from trainer.base import RunOptions
from trainer.build import build_trainer
from utils import distributed
from utils.compared import config_hash
from utils.config import to_plain
from utils.errors import UserError
from utils.logging import peak_memory_gib, read_jsonl
from utils.tensor_files import save_file
from utils.writing import whole_file, write_text

SHOWN = 6  # videos a strip


@dataclass(frozen=True)
class Options:
    """Options of all jobs: the folder, how many videos are judged, the split, and what shortens runs in a trial."""

    root: Path
    count: int = 400
    split: str = "test"
    quick: bool = False


@dataclass(frozen=True)
class Job:
    """One row and seed."""

    method: Method
    seed: int
    options: Options

    @property
    def folder(self) -> Path:
        return run_folder(self.options.root, self.method.key, self.seed, once=self.method.once)

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def config(self) -> RunConfig | None:
        """The run's, or None for a row that trains nothing. Raises ConfigError."""
        method = self.method
        if method.recipe is None:
            return None
        folder = "digits" if method.group == "digits" else "methods"
        starts = [f"{network}.init={self.folder_of(row)}" for network, row in method.start.items()]
        quick = _quick(method.recipe) if self.options.quick else []
        return load_run(
            Path(f"configs/{folder}/{method.recipe}.yaml"),
            [f"seed={self.seed}", *method.overrides, *starts, *quick],
        )

    def folder_of(self, row: str) -> Path:
        return run_folder(self.options.root, row, self.seed, once=BY_KEY[row].once)

    def needs(self, other: Job) -> bool:
        """Whether this job starts from the other."""
        return other.method.key in self.method.needs() and (other.method.once or other.seed == self.seed)

    def starts(self) -> list[Job]:
        """The jobs whose runs it starts from, in order."""
        rows = [BY_KEY[row] for row in sorted(self.method.needs())]
        return [Job(row, 0 if row.once else self.seed, self.options) for row in rows]

    def trained(self) -> str:
        """A name of all that its weights depend on: the run's config, and those of the runs it starts from."""
        config = self.config()
        return config_hash([None if config is None else to_plain(config), [start.trained() for start in self.starts()]])

    def judged(self) -> str:
        """A name of all that its result depends on."""
        method, options = self.method, self.options
        how = [method.run, method.steps, method.causal_from, method.low]
        return config_hash([self.trained(), options.count, options.split, how])


def run_folder(root: Path, key: str, seed: int, *, once: bool) -> Path:
    return root / key / ("once" if once else f"seed_{seed}")


def _quick(recipe: str) -> list[str]:
    """Overrides of a trial run: everything happens, nothing is learnt."""
    short = [
        "training.max_steps=3",
        "training.global_batch_size=2",
        "training.micro_batch_size=2",
        "checkpoint.every=3",
    ]
    if recipe in ("teacher", "causal_init"):
        return short
    if recipe == "ode":
        return [*short, "ode.pairs=2", "ode.steps=3"]
    if recipe == "consistency":
        return [*short, "consistency.steps=3"]
    return [*short, "training.critic_warmup_steps=1", "training.generator_update_interval=2"]


def perform(job: Job) -> None:
    """Trains what is to be trained, judges it and writes the result. What it prints goes to the folder's log.txt, and
    so does the reason of a failure, which is raised again."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(job.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        if not finished(job):
            _judge(job, _train(job))
    except BaseException:
        traceback.print_exc()
        raise


def _train(job: Job) -> dict[str, float]:
    """What training cost: evaluations of networks, in videos, and megabytes beyond those of the idle process."""
    config, cost, begun = job.config(), job.folder / "cost.json", job.folder / "begun"
    if config is None:
        return {}
    identity = job.trained()
    same = begun.is_file() and begun.read_text() == identity
    if same and cost.is_file():
        known: dict[str, float] = json.loads(cost.read_text())
        return known
    cost.unlink(missing_ok=True)
    write_text(begun, identity)
    idle = peak_memory_gib()
    options = RunOptions(job.folder, "auto" if same else "never", wandb=False, visualize=False)
    if build_trainer(config, options).train():
        raise UserError("stopped, and saved: the same command goes on from here")
    last = next(line for line in reversed(read_jsonl(job.folder / "metrics.jsonl")) if "network_evaluations" in line)
    spent = {
        "network_evaluations": last["network_evaluations"],
        "peak_mb": (peak_memory_gib() - idle) * 2**30 / 1e6,
    }
    write_text(cost, json.dumps(spent))
    return spent


def _judge(job: Job, trained: dict[str, float]) -> None:
    """The result's file; of what is trained for others alone it says no more than that."""
    said: dict[str, Any] = {"key": job.method.key, "seed": job.seed, "training": trained, "identity": job.judged()}
    if job.method.group:
        said |= _judged(job)
    write_text(job.result, json.dumps(said, indent=1))


def _judged(job: Job) -> dict[str, Any]:
    options = job.options
    generator = _generator(job)
    judge = judge_of(generator.task, Path("logs/cache"))
    assert judge is not None
    shown = spread(judge.world.captions, SHOWN)
    if job.method.key.endswith("real"):
        row = evaluate_real(judge, count=options.count, split=options.split)
        pictures = judge.world.real_videos_for(shown, seed=0)
    else:
        sampling = Sampling(steps=job.method.steps)
        row, _ = evaluate_generator(
            job.method.key, generator, judge, count=options.count, split=options.split, sampling=sampling
        )
        pictures = generate_all(generator, shown, sampling)
    with whole_file(job.folder / "shown.safetensors") as temporary:
        save_file({"pixels": judge.world.decode(pictures)[:, :, :1].contiguous()}, temporary)
    return {"metrics": row.metrics, "evaluations": row.evaluations, "shown": shown}


def _generator(job: Job) -> Generator:
    method, device = job.method, distributed.device()
    if method.key.endswith("real"):
        return Generator.load(job.folder_of(next(iter(method.needs()))), device)
    folder = job.folder if method.run is None else job.folder_of(method.run)
    if method.low is not None:
        low = Generator.load(job.folder_of(method.low), device, student=StudentChoice(expert=Expert.low))
        return Generator.load(folder, device, student=StudentChoice(expert=Expert.high)).with_low(low)
    generator = Generator.load(folder, device)
    if method.causal_from is not None:
        return generator.as_causal(Generator.load(job.folder_of(method.causal_from), device).config)
    return generator


def finished(job: Job) -> bool:
    """Whether the job's result exists and is of its config. The jobs that it needs must be finished."""
    try:
        return bool(json.loads(job.result.read_text())["identity"] == job.judged())
    except (OSError, ValueError, KeyError):
        return False


def pictures(job: Job) -> Tensor:
    """Pixels [P, T, 1, H, W] in [0, 1] of the shown prompts."""
    return load_file(job.folder / "shown.safetensors")["pixels"]
