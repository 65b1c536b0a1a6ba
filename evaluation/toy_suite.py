"""Evaluation on the toy worlds, which know the truth about their videos: `python evaluate.py --suite toy`.

Videos are judged by a classifier and a tracker that never saw a generator, for prompts and seeds of their own: split
'dev' is for choosing hyper-parameters, 'test' for reporting, and they share neither seeds nor prompt lists.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from generation.generator import Generator
from generation.sampling import Sampling
from tasks.task import Task
from tasks.world import Judge, WorldTask
from utils.random import keyed_seed
from utils.writing import write_text

SPLITS = {"dev": 7001, "test": 9001}  # seeds of prompts and noise


@dataclass(frozen=True)
class Row:
    """One line of the table. metrics: the judge's; evaluations: of networks, a video; seconds: of CPU, a video."""

    name: str
    metrics: dict[str, float]
    evaluations: float
    seconds: float


def judge_of(task: Task, cache: Path) -> Judge | None:
    """The judge of a world, kept in `cache`; None for a task without one."""
    return task.judge(cache) if isinstance(task, WorldTask) else None


def eval_prompts(captions: Sequence[str], count: int, split: str) -> list[str]:
    """`count` prompts drawn uniformly, keyed by the split."""
    rng = random.Random(keyed_seed(SPLITS[split], "prompts"))
    return [rng.choice(captions) for _ in range(count)]


@torch.no_grad()
def generate_all(generator: Generator, prompts: Sequence[str], sampling: Sampling, batch: int = 50) -> Tensor:
    """Latents [N, F, C, H, W] for all prompts; video i is keyed by i.

    If the run's videos begin with real first frames, those of held-out real videos of the prompts are used.
    """
    parts, first_frames, task = [], None, generator.task
    if isinstance(task, WorldTask) and task.begins_real:
        first_frames = task.decode(task.first_frames(prompts, sampling.seed))
    for start in range(0, len(prompts), batch):
        ids = range(start, min(start + batch, len(prompts)))
        first = None if first_frames is None else first_frames[ids.start : ids.stop]
        parts.append(generator([prompts[i] for i in ids], sampling, ids, first).float().cpu())
    return torch.cat(parts)


def evaluate_generator(
    name: str, generator: Generator, judge: Judge, *, count: int, split: str, sampling: Sampling
) -> tuple[Row, Tensor]:
    """A row of the table, and the latents that it judges."""
    prompts = eval_prompts(judge.world.captions, count, split)
    before, started = generator.score.evaluations.total_frames, time.process_time()
    latents = generate_all(generator, prompts, replace(sampling, seed=SPLITS[split]))
    seconds = (time.process_time() - started) / count
    evaluated = (generator.score.evaluations.total_frames - before) / latents.shape[1] / count
    return Row(name, judge.evaluate(latents, prompts), evaluated, seconds), latents


def evaluate_real(judge: Judge, *, count: int, split: str) -> Row:
    """Held-out real videos of the same prompts: what a perfect generator would score."""
    prompts = eval_prompts(judge.world.captions, count, split)
    latents = judge.world.real_videos_for(prompts, seed=SPLITS[split])
    return Row("real, held out", judge.evaluate(latents, prompts), 0.0, 0.0)


COLUMNS = (  # a table has those that its judge gives, after the shares of what is right
    ("appearance FD", "appearance_fd", "{:.2f}"),
    ("FID-like", "fid", "{:.2f}"),
    ("novelty", "novelty", "{:.2f}"),
    ("motion error", "motion_error", "{:.3f}"),
    ("jitter px", "jitter", "{:.2f}"),
    ("flicker", "flicker", "{:.3f}"),
    ("intensity", "intensity", "{:.4f}"),
    ("saturation", "saturation", "{:.4f}"),
    ("diversity", "diversity", "{:.2f}"),
    ("drift", "appearance_drift", "{:.1f}"),
    ("fading", "intensity_drift", "{:.3f}"),
    ("motion", "motion", "{:.4f}"),
)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    shares = [key for key in rows[0].metrics if key.endswith("_right")]
    columns = [
        ("prompt right" if key == "prompt_right" else key.removesuffix("_right"), key, "{:.3f}") for key in shares
    ]
    columns += [column for column in COLUMNS if column[1] in rows[0].metrics]
    heads = ["", *(head for head, _, _ in columns), "evaluations"]
    lines = [[r.name, *(form.format(r.metrics[key]) for _, key, form in columns), f"{r.evaluations:.1f}"] for r in rows]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    show = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in [heads, *lines]
    ]
    return "\n".join("  ".join(line) for line in show)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """JSON, replaced as a whole."""
    write_text(path, json.dumps([asdict(row) for row in rows], indent=1), "--out")
