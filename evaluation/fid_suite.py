"""Frechet distance of a run's videos to real ones, with drift, diversity and motion: `--suite fid`.

B batch  F frames that have features  D features  T pixel frames  C channels  h w pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from evaluation.features import load_features
from evaluation.toy_suite import SPLITS, eval_prompts
from evaluation.videos import generated_videos, real_videos
from generation.batch import chosen_batch, free_memory
from generation.generator import Generator
from generation.sampling import Sampling
from tasks.kinds.toy import ToyTask
from utils.data.prompts import load_prompts
from utils.errors import UserError
from utils.logging import console
from utils.metrics import Moments, diversity, drift, few_samples, frame_luma, frechet_between, motion
from utils.reading import UTF8
from worlds.toy_judge import ToyJudge

Features = Callable[[Tensor], Tensor]  # pixels [B, T, C, h, w] -> [B, F, D]


@dataclass
class VideoSet:
    """Statistics of a set of videos that are taken in batch by batch.

    frames: moments of the features of frames.
    videos: moments of the features of whole videos, the means over their frames.
    features: those of whole videos, a batch each.
    measures: by name, a value for each video, a batch each.
    """

    frames: Moments = field(default_factory=Moments)
    videos: Moments = field(default_factory=Moments)
    features: list[Tensor] = field(default_factory=list)  # [B, D] each
    measures: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, pixels_BTChw: Tensor, features: Features) -> None:
        """Takes in a batch. Raises ValueError for pixels that the features are not made for."""
        features_BFD = features(pixels_BTChw)
        whole_BD = features_BFD.mean(dim=1)
        self.frames.add(features_BFD.flatten(0, 1))
        self.videos.add(whole_BD)
        self.features.append(whole_BD)
        if pixels_BTChw.shape[1] > 1:
            self._keep("luma_drift", drift(frame_luma(pixels_BTChw)).abs())
            self._keep("motion", motion(pixels_BTChw))
        if features_BFD.shape[1] > 1:
            self._keep("appearance_drift", drift(features_BFD).norm(dim=-1))

    def _keep(self, name: str, values_B: Tensor) -> None:
        self.measures.setdefault(name, []).append(values_B)

    @property
    def count(self) -> int:
        return self.videos.count

    def summary(self) -> dict[str, float]:
        """Means over videos, each with its standard error `*_se`, diversity and counts."""
        out = {"videos": float(self.count), "frames": float(self.frames.count)}
        for name, parts in self.measures.items():
            values = torch.cat(parts).double()
            out[name] = values.mean().item()
            out[f"{name}_se"] = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return out | {"diversity": diversity(torch.cat(self.features))}


def video_set(batches: Iterable[Tensor], features: Features) -> VideoSet:
    """The statistics of batches of pixels [B, T, C, h, w] in [0, 1]."""
    out = VideoSet()
    for pixels in batches:
        out.add(pixels, features)
    return out


def compare(generated: VideoSet, real: VideoSet) -> dict[str, dict[str, float]]:
    """`generated` and `real`: each set's summary; the former with its distances to the latter.

    fd_frames: Frechet distance with each frame a sample (an FID), fd_videos: with each video a sample, where both sets
    are videos. One of few samples is warned of: there is no floor beside it. Raises ValueError for fewer than two.
    """
    rows = {"generated": generated.summary(), "real": real.summary()}
    sets = {"fd_frames": (generated.frames, real.frames)}
    if real.frames.count > real.count > 1 and generated.count > 1:
        sets["fd_videos"] = (generated.videos, real.videos)
    for name, (ours, theirs) in sets.items():
        rows["generated"][name] = frechet_between(ours, theirs)
        if few := few_samples(ours, theirs):
            console.warning("%s: %s", name, few)
    return rows


@dataclass(frozen=True)
class FidArgs:
    """What `--suite fid` was asked.

    features: 'toy', an encoder's folder, or None for the toy world's own.
    real: a folder of real videos, or None for the toy world's held-out ones.
    prompts: a file, or None for the run's own.
    count: videos to judge.
    split: "dev" or "test", which decides seeds and the toy world's prompts.
    cache: folder of the toy world's judge.
    batch: videos made at once, or None for what fits into memory, or 50 of the toy world.
    encoding: of `prompts`.
    """

    features: str | None
    real: Path | None
    prompts: Path | None
    count: int
    split: str
    cache: Path
    batch: int | None
    encoding: str = UTF8


def evaluate_fid(generator: Generator, args: FidArgs, sampling: Sampling) -> dict[str, dict[str, float]]:
    """The rows of `compare` for a run. Raises UserError."""
    task = generator.task
    judge = ToyJudge(task.world, args.cache) if isinstance(task, ToyTask) else None
    if args.real is None and judge is None:
        raise UserError("--real: only the toy world has held-out videos: give a folder of real videos or images")
    features = _features(args.features, judge, generator.device)
    prompts = _prompts(generator, args, judge)
    seed, batch = SPLITS[args.split], args.batch or _batch(generator, sampling, len(prompts), judge)
    videos = generated_videos(generator, prompts, replace(sampling, seed=seed), range(len(prompts)), batch)
    try:
        first = next(videos)
        # before hours of sampling: a folder that cannot be read, or frames that the features are not made for
        real = video_set(_real(args.real, judge, prompts, seed, first.shape[1]), features)
        return compare(video_set(chain([first], videos), features), real)
    except UserError:
        raise
    except ValueError as problem:
        raise UserError(f"--suite fid: {problem}") from None


def _batch(generator: Generator, sampling: Sampling, videos: int, judge: ToyJudge | None) -> int:
    return chosen_batch(generator, sampling, videos, free_memory(generator.device)) if judge is None else 50


def _features(name: str | None, judge: ToyJudge | None, device: torch.device) -> Features:
    if name in (None, "toy"):
        if judge is None:
            raise UserError("--features: only the toy world has its own: give the folder of an image or video encoder")
        return judge.features
    try:
        return load_features(str(name), device)
    except ValueError as problem:
        raise UserError(f"--features: {problem}") from None


def _prompts(generator: Generator, args: FidArgs, judge: ToyJudge | None) -> list[str]:
    """`count` prompts, of the file (repeated from its start if it has fewer) or of the task."""
    if args.prompts is not None:
        try:
            found = load_prompts(args.prompts, args.encoding)
        except (ValueError, OSError) as problem:
            raise UserError(f"--prompts: {problem}") from None
        return [found[i % len(found)] for i in range(args.count)]
    if judge is not None:
        return eval_prompts(judge.world.captions, args.count, args.split)
    return generator.task.validation_prompts(args.count)


def _real(
    folder: Path | None, judge: ToyJudge | None, prompts: Sequence[str], seed: int, frames: int
) -> Iterator[Tensor]:
    if folder is not None:
        yield from real_videos(folder, frames)
    else:
        assert judge is not None
        world = judge.world
        for start in range(0, len(prompts), 200):
            part = prompts[start : start + 200]
            yield world.decode(world.real_videos_for(part, seed=seed + start))[:, :frames]


def report(rows: dict[str, dict[str, float]]) -> str:
    """The rows as text, a line a measure."""
    generated, real = rows["generated"], rows["real"]
    names = [name for name in generated if not name.endswith("_se")]
    width = max(map(len, names))
    lines = [f"{'':{width}}  {'generated':>20}  {'real':>20}"]
    lines += [f"{name:{width}}  {_cell(generated, name):>20}  {_cell(real, name):>20}" for name in names]
    return "\n".join(lines)


def _cell(row: dict[str, float], name: str) -> str:
    if name not in row:
        return "-"
    error = row.get(f"{name}_se")
    return f"{row[name]:.4g}" + ("" if error is None else f" ± {error:.1g}")
