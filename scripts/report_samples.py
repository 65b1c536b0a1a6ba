"""The videos behind the report: each method's samples for the judged prompts and for the shown ones, made by worker
processes in parts of which each is a file, so that a broken-off evaluation goes on where it stopped.

N videos  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.load import load_run, run_from_state
from configs.schema import RunConfig
from generation.generator import Generator
from generation.pretrained import Model, load_model
from generation.sampling import Sampling
from scripts.quickstart import CAUSAL_INIT, DMD, RECIPES, TEACHER, TEACHER_ASSET, TEACHER_DETAILS
from utils import checkpoint, distributed
from utils.errors import UserError
from utils.tensor_files import save_file
from utils.writing import whole_file

RUNS = {
    TEACHER: "Teacher",
    CAUSAL_INIT: "Causal initialisation (diffusion forcing)",
    DMD: "Self-Forcing + DMD",
}
TEACHER_RECIPE = RECIPES / f"{TEACHER_DETAILS}.yaml"  # says how the asset's weights are sampled
PART = 25  # judged videos a file
BATCH_MANY_STEPS, BATCH_FEW_STEPS = 10, 25  # videos at once: measured on CPU, the bidirectional net likes them small


@dataclass(frozen=True)
class Method:
    """A row of the table.

    key: names the row.
    label: in words.
    group: heading of its group.
    run: whose weights are sampled, None for real videos.
    steps: of the sampler.
    causal_from: another run. The weights, of a bidirectional run, are used block by block, with the blocks and the
        step list of this one.
    """

    key: str
    label: str
    group: str
    run: str | None = None
    steps: int | None = None
    causal_from: str | None = None

    @property
    def short(self) -> str:
        """The label below its group's heading."""
        said = self.label.removeprefix("Causal, ")
        return said[:1].upper() + said[1:]


_TEACHER_GROUP, _BEFORE, _AFTER = "Teacher, bidirectional", "Causal, before distillation", "Causal, distilled"
METHODS = (
    Method("real", "Real, held out", "Data"),
    *(Method(f"teacher_{n}", f"Teacher, {n} step{'s'[: n > 1]}", _TEACHER_GROUP, TEACHER, n) for n in (50, 4, 2, 1)),
    Method("causal_teacher", "Causal, teacher's weights", _BEFORE, TEACHER, None, CAUSAL_INIT),
    Method("causal_init", "Causal, diffusion forcing", _BEFORE, CAUSAL_INIT),
    Method("dmd", "Causal, Self-Forcing + DMD", _AFTER, DMD),
)


@dataclass(frozen=True)
class Place:
    """Where the weights are. root: folder of the runs; teacher: a run, or a folder of exported weights."""

    root: Path
    teacher: Path = TEACHER_ASSET

    def of(self, run: str) -> Path:
        return self.teacher if run == TEACHER else self.root / run

    def is_trained(self, run: str) -> bool:
        return self.is_exported(run) or checkpoint.latest(self.of(run) / "checkpoints") is not None

    def is_exported(self, run: str) -> bool:
        return run == TEACHER and (self.teacher / "config.json").is_file()

    def config(self, run: str) -> RunConfig:
        """That the weights were trained with. Raises UserError."""
        if self.is_exported(run):
            return load_run(TEACHER_RECIPE)
        return run_from_state(checkpoint.load_state(self._checkpoint(run))["config"])

    def settings(self, run: str) -> str:
        """The config as text, unread. Raises UserError."""
        if self.is_exported(run):
            return TEACHER_RECIPE.read_text()
        return json.dumps(checkpoint.load_state(self._checkpoint(run))["config"], sort_keys=True)

    def files(self, run: str) -> list[Path]:
        """Of the weights that are sampled. Raises UserError."""
        if self.is_exported(run):
            return sorted(self.teacher.glob("*.safetensors"))
        folder = self._checkpoint(run)
        averaged = "student_ema" in checkpoint.tensor_names(folder)
        return checkpoint.files_of(folder, "student_ema" if averaged else "student")

    def _checkpoint(self, run: str) -> Path:
        folder = checkpoint.latest(self.of(run) / "checkpoints")
        if folder is None:
            raise UserError(f"{self.of(run)} holds no checkpoint: train it first")
        return folder

    def generator(self, run: str) -> Generator:
        if self.is_exported(run):
            return load_model(Model(str(self.teacher), config_path=TEACHER_RECIPE), Sampling(), distributed.device())
        return Generator.load(self.of(run), distributed.device())


@dataclass(frozen=True)
class Part:
    """Some videos of one method.

    place: where the weights are.
    method: the row.
    name: of their file.
    prompts: one for each video.
    ids: key the noise of each video.
    seed: of the noise.
    identity: all that their pixels depend on.
    """

    place: Place
    method: Method
    name: str
    prompts: tuple[str, ...]
    ids: tuple[int, ...]
    seed: int
    identity: str

    @property
    def path(self) -> Path:
        return self.place.root / "evaluation" / self.method.key / f"{self.name}.safetensors"


@dataclass(frozen=True)
class Samples:
    """latents [N, F, C, H, W]; evaluations: of the network, a video; seconds: processor time, a video."""

    latents: Tensor
    evaluations: float
    seconds: float


def available(place: Place) -> tuple[list[Method], list[Method]]:
    """(methods whose weights are there, the others)."""
    trained = {run for run in RUNS if place.is_trained(run)}
    split: tuple[list[Method], list[Method]] = ([], [])
    for method in METHODS:
        split[not {method.run, method.causal_from} <= {*trained, None}].append(method)
    return split


def parts(place: Place, method: Method, name: str, prompts: Sequence[str], seed: int, size: int = PART) -> list[Part]:
    """A method's videos of these prompts, file by file.

    place: where the weights are.
    method: the row.
    name: of the files, before their numbers.
    prompts: one for each video.
    seed: video i is keyed by (seed, i), whatever the size.
    size: videos a file.
    """
    identity = _identity(place, method)
    starts = range(0, len(prompts), size)
    chunks = [range(start, min(start + size, len(prompts))) for start in starts]
    return [
        Part(
            place=place,
            method=method,
            name=f"{name}_{ids[0]:04d}",
            prompts=tuple(prompts[i] for i in ids),
            ids=tuple(ids),
            seed=seed,
            identity=identity,
        )
        for ids in chunks
    ]


def make(todo: Sequence[Part], workers: int) -> Iterable[Part]:
    """Makes these parts, the costly ones first, in `workers` processes of one thread each, or in this one; yields each
    as it is done."""
    order = sorted(todo, key=_cost, reverse=True)
    if workers == 1:
        for part in order:
            make_part(part)
            yield part
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        waiting = {pool.submit(make_part, part): part for part in order}
        for future in as_completed(waiting):
            future.result()
            yield waiting[future]
    finally:
        pool.shutdown(cancel_futures=True)


def make_part(part: Part) -> None:
    """Generates one part and writes it, whole or not at all."""
    assert part.method.run is not None
    generator = _generator(part.place, part.method.run, part.method.causal_from)
    evaluations, started = generator.score.evaluations, process_time()
    before = evaluations.total_frames
    batch = BATCH_FEW_STEPS if generator.few_steps else BATCH_MANY_STEPS
    sampling = Sampling(steps=part.method.steps, seed=part.seed)
    starts = range(0, len(part.ids), batch)
    chunks = [slice(start, start + batch) for start in starts]
    latents = torch.cat([generator(part.prompts[c], sampling, part.ids[c]).float().cpu() for c in chunks])
    evaluated = (evaluations.total_frames - before) / latents.shape[1]
    about = {"key": _key(part), "evaluations": repr(evaluated), "seconds": repr(process_time() - started)}
    with whole_file(part.path, "--root") as partial:
        save_file({"latents": latents.contiguous()}, partial, metadata=about)


def is_done(part: Part) -> bool:
    """Whether the part's file exists, whole, and was made of the same weights, prompts and seed."""
    try:
        with safe_open(part.path, framework="pt") as file:
            return file.metadata().get("key") == _key(part) and len(file.get_tensor("latents")) == len(part.ids)
    except (OSError, SafetensorError):
        return False


def load(made: Sequence[Part]) -> Samples:
    """The parts put together."""
    latents, evaluations, seconds = [], 0.0, 0.0
    for part in made:
        with safe_open(part.path, framework="pt") as file:
            latents.append(file.get_tensor("latents"))
            evaluations += float(file.metadata()["evaluations"])
            seconds += float(file.metadata()["seconds"])
    count = sum(len(part.ids) for part in made)
    return Samples(torch.cat(latents), evaluations / count, seconds / count)


def _cost(part: Part) -> int:
    many_steps = part.method.run == TEACHER and part.method.causal_from is None
    return (part.method.steps or 1) * len(part.ids) * (2 if many_steps else 1)


def _key(part: Part) -> str:
    said = json.dumps([part.identity, part.prompts, part.ids, part.seed])
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _identity(place: Place, method: Method) -> str:
    """The method, the weights, and the configs that say how they are sampled."""
    digest = hashlib.blake2b(json.dumps([method.run, method.steps, method.causal_from]).encode(), digest_size=16)
    for run in filter(None, (method.run, method.causal_from)):
        digest.update(place.settings(run).encode())
        if run == method.run:
            for file in place.files(run):
                digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _generator(place: Place, run: str, causal_from: str | None) -> Generator:
    generator = place.generator(run)
    return generator if causal_from is None else generator.as_causal(place.config(causal_from))


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for work for good."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
