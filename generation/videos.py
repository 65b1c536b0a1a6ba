"""What inference.py does: a file for each prompt, over as many processes as there are, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from generation.batch import chosen_batch, free_memory
from generation.command import InferenceArgs
from generation.footage import read_footage
from generation.generator import Generator
from generation.places import places, same_settings
from model.family import Network, Trait
from utils import distributed
from utils.compared import config_hash
from utils.errors import ConfigError, UserError
from utils.limits import check_size
from utils.overlap import SideDecoder
from utils.parallel.mesh import Mesh, ParallelConfig, build_mesh
from utils.parallel.sequence import apply_sequence_parallel, check_degree
from utils.shards import is_finite
from utils.tensor_files import save_file
from utils.video import eight_bits, write_video
from utils.writing import check_writable, drop_partials, whole_file


def team(args: InferenceArgs, generator: Generator) -> Mesh:
    """The processes at hand: groups of `args.sequence`, each with prompts of its own. Raises UserError."""
    world, size = distributed.world_size(), args.sequence
    try:
        mesh = build_mesh(ParallelConfig(replicate=max(world // size, 1), shard=1, sequence=size), world)
    except ConfigError:
        raise UserError(f"--sequence_parallel {size}: {world} processes do not fall into groups of so many") from None
    if mesh.sequence_group is not None:
        net = generator.score.net
        if not isinstance(net, Network):
            raise UserError("--sequence_parallel is for one network: two experts run in one process each")
        student = generator.config.student
        if Trait.sequence not in student.family.traits:
            raise UserError(f"--sequence_parallel: the family of preset {student.preset} has no sequence: leave it out")
        try:
            check_degree(net.config.num_heads, size)
        except ValueError as problem:
            raise UserError(f"--sequence_parallel: {problem}") from None
        apply_sequence_parallel(net, mesh.sequence_group)
    return mesh


def check_out(args: InferenceArgs) -> None:
    """Raises UserError where no video can be written: before a network is loaded for it."""
    paths, resumable = places(args)
    check_writable(args.out if resumable else paths[0], "--out", folder=resumable)


def generate_videos(generator: Generator, args: InferenceArgs) -> int:
    """Writes one file a prompt and says where; of a prompt file those that exist are skipped. Returns the exit code.

    Videos are keyed by their prompt's number in the list, so they are the same over any number of processes."""
    paths, resumable = places(args)
    _same_checkpoints(generator)
    mesh, footage = team(args, generator), read_footage(generator, args.footage, args.sampling)
    fps, batch = args.fps or generator.config.fps, args.batch or _fitting(generator, args, mesh)
    if args.scale is not None and args.suffix != "safetensors":
        size = generator.task.pixel_size(1)
        check_size("pixels", size.height * size.width * args.scale**2, f"--scale {args.scale}", unit="pixels")
    if resumable:
        same_settings(args, paths, generator.checkpoints, fps, batch)
    # one process looks: others may see a network's files later, or those of one that is at work already
    missing = [i for i, path in enumerate(paths) if not (resumable and path.is_file())]
    todo = sorted(distributed.union(missing if distributed.is_main() else ()))
    if len(todo) < len(paths) and distributed.is_main():
        print(f"{len(paths) - len(todo)} of {len(paths)} videos are there already")
    if not resumable and any(path.is_file() for path in paths) and distributed.is_main():
        print(f"{paths[0]} is there already: it is made again, and replaced once that is done")
    mine, writes = todo[mesh.dp_rank :: mesh.dp_size], mesh.sequence_rank == 0
    rate = Rate()
    with tqdm(total=len(mine), desc="videos", disable=None if distributed.is_main() else True) as bar:
        for start in range(0, len(mine), batch):
            ids = mine[start : start + batch]
            blocks = generator.stream([args.prompts[i] for i in ids], args.sampling, ids, *footage)
            parts = _decoded(blocks, _decoder(generator, args) if writes else None)
            _write(_watched(parts, rate, bar), [paths[i] for i in ids], [args.prompts[i] for i in ids], args, fps)
            bar.update(len(ids))
    whole = int(distributed.all_reduce_scalars({"frames": rate.frames})["frames"])
    if distributed.is_main():
        unit = "latent frames" if args.suffix == "safetensors" else "frames"
        print(f"{len(todo)} videos, {whole} {unit} {rate.told(whole)} -> {args.out}")
    return 0


def _fitting(generator: Generator, args: InferenceArgs, mesh: Mesh) -> int:
    """How many videos are made at once where the command does not say, said on the console; alike on all ranks."""
    room = distributed.all_reduce_scalars({"room": float(free_memory(generator.device))}, "min")["room"]
    return chosen_batch(generator, args.sampling, len(args.prompts), room, mesh.sequence)


class Rate:
    """Frames, and the time that they took. Videos' first parts are counted apart: they wait for text and kernels."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.frames, self.first = 0, 0.0
        self._later, self._seconds = 0, 0.0

    def follow(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Counts the parts [B, T, ...] of videos as they pass."""
        last: float | None = None
        for part in parts:
            now, frames = time.perf_counter(), part.shape[0] * part.shape[1]
            self.frames += frames
            if last is None:
                self.first = self.first or now - self.started
            else:
                self._later, self._seconds = self._later + frames, self._seconds + now - last
            last = now
            yield part

    @property
    def overall(self) -> float:
        """Frames a second so far."""
        return self.frames / max(time.perf_counter() - self.started, 1e-9)

    def told(self, frames: int) -> str:
        """In words, of so many frames over all processes; pace and first part are this one's."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        then = f", {self._later / self._seconds:.1f} frames/s once videos have begun" if self._later else ""
        return f"in {seconds:.1f} s ({frames / seconds:.1f} frames/s; the first after {self.first:.2f} s{then})"


def _watched(parts: Iterable[Tensor], rate: Rate, bar: tqdm[Any]) -> Iterator[Tensor]:
    for part in rate.follow(parts):
        bar.set_postfix_str(f"{rate.overall:.1f} frames/s")
        yield part


def _decoder(generator: Generator, args: InferenceArgs) -> SideDecoder:
    """What decodes one video's blocks."""
    as_they_are = args.suffix == "safetensors"
    return SideDecoder((lambda latents: latents) if as_they_are else generator.task.decoding(), generator.device)


def _decoded(blocks: Iterable[Tensor], decoder: SideDecoder | None) -> Iterator[Tensor]:
    """Each block's pixels, waited for once the next block is begun. Without a decoder the blocks are made alone."""
    begun: Callable[[], Tensor] | None = None
    for block in blocks:
        if decoder is None:
            continue
        if begun is not None:
            yield begun()
        begun = decoder.start(block)
        if not decoder.overlaps:
            yield begun()
            begun = None
    if begun is not None:
        yield begun()


def _write(
    parts: Iterator[Tensor], paths: Sequence[Path], prompts: Sequence[str], args: InferenceArgs, fps: int
) -> None:
    """parts: pixels [B, T, 3, h, w] in [0, 1], or latents [B, F, C, H, W], one after the other; none where another
    process writes. A video by itself is written as it comes."""
    first = next(parts, None)
    if first is None:
        return
    for path in paths:
        drop_partials(path)
    every = chain([first], parts)
    if args.suffix == "safetensors":
        for latents, path, prompt in zip(torch.cat(list(every), 1), paths, prompts, strict=True):
            if not is_finite(latents):
                raise UserError(f"--out {path}: its latents hold NaN or infinity: the network gave no numbers")
            with whole_file(path, "--out") as temporary:
                said = {"prompt": prompt, "seed": str(args.sampling.seed)}
                save_file({"latents": latents.contiguous()}, temporary, said)
        return
    scale = args.scale or max(1, 128 // first.shape[-1])
    if len(paths) == 1:
        write_video(paths[0], (part[0] for part in every), fps, scale)
        return
    held = [eight_bits(part) for part in every]
    for i, path in enumerate(paths):
        write_video(path, (part[i] for part in held), fps, scale)


def _same_checkpoints(generator: Generator) -> None:
    """Raises UserError on every rank where not all ranks found the same latest checkpoint of a run."""
    loaded = config_hash(list(generator.checkpoints))
    if set(distributed.all_gather_text(loaded)) != {loaded}:
        raise UserError("--run: processes have found different checkpoints, for it is being trained: give --checkpoint")
