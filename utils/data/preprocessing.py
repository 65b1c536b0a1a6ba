"""Work done once before training: videos to latents, prompts to a teacher's ODE trajectories, in files by number.

    OUT/latents_00003_of_00064.parquet     or .safetensors
    OUT/ode_00003_of_00064.safetensors

Which samples a file holds depends on its number only, so any number of processes share the files out, and one that
died is started again: files that are there are whole, and are not made again. The networks come as callables.
"""

# B batch  T frames  F latent frames  C channels  H W size  S stored points  L text tokens  D text channels

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from utils.data.clips import ImageClips, VideoClips
from utils.data.parquet import read_metadata, write_parquet
from utils.data.safetensors_shards import read_header, write_latents, write_trajectories
from utils.data.stream import MAX_CORRUPT, REMEDY_BEFORE, CorruptSample, Faults, Sample
from utils.data.tensors import Statistics
from utils.logging import Progress

EncodeVideo = Callable[[Tensor], Tensor]  # pixels [B, T, 3, H, W] in [0, 1] -> normalised latents [B, F, C, H, W]
EncodeVisual = Callable[
    [int, Tensor], Mapping[str, Tensor]
]  # a video's frames, first ones [B, 3, H, W] -> Sample fields
EncodeText = Callable[[Sequence[str]], Sequence[Tensor]]  # captions -> embeddings [L, D] without padding
MakeTrajectories = Callable[[range, Sequence[str]], Tensor]  # positions, their prompts -> [B, S, F, C, H, W]

SUFFIXES: Final = {"parquet": ".parquet", "safetensors": ".safetensors"}
IDENTITY: Final = "fewstep.identity"


@dataclass(frozen=True)
class Share:
    """Files index, index + count, index + 2 count, ... are this process's."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index}/{self.count}: give i/n, i from 0 to n - 1")

    @classmethod
    def parse(cls, text: str) -> Share:
        """From "i/n". Raises ValueError."""
        if (match := re.fullmatch(r"(\d+)/(\d+)", text)) is None:
            raise ValueError(f"share {text!r}: give i/n, i from 0 to n - 1")
        return cls(int(match[1]), int(match[2]))


@dataclass
class Report:
    """What a call did: files made, files that were there, rows written, and why it left samples out."""

    made: int = 0
    there: int = 0
    rows: int = 0
    corrupt: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Files:
    """The files of one job: `size` items, `rows` to a file. identity: what must be the same in all of them."""

    out: Path
    stem: str
    suffix: str
    size: int
    rows: int
    identity: str

    def __post_init__(self) -> None:
        if self.size < 1 or self.rows < 1:
            raise ValueError(
                f"{self.out}: needs at least one sample and one row a file, got {self.size} and {self.rows}"
            )

    @property
    def count(self) -> int:
        return -(-self.size // self.rows)

    def path(self, number: int) -> Path:
        return self.out / f"{self.stem}_{number:05d}_of_{self.count:05d}{self.suffix}"

    def items(self, number: int) -> range:
        return range(number * self.rows, min((number + 1) * self.rows, self.size))

    def missing(self, share: Share) -> list[int]:
        """The files of a share that are not there. Raises ValueError where `out` holds another job's."""
        wanted = {self.path(number).name for number in range(self.count)}
        for path in self.out.glob(f"{self.stem}_*_of_*"):
            if path.name not in wanted:
                raise ValueError(
                    f"{path} is of another job (another number of samples, rows or format): give another --out"
                )
            if _identity_of(path) not in (None, self.identity):
                raise ValueError(
                    f"{path} was made from other data or settings: give another --out, or delete this folder"
                )
        own = range(share.index, self.count, share.count)
        return [number for number in own if not self.path(number).is_file() or _identity_of(self.path(number)) is None]


def encode_videos(  # noqa: PLR0913 - options of a command, by name
    clips: VideoClips,
    encode: EncodeVideo,
    out: Path,
    *,
    settings: Mapping[str, Any],
    encode_text: EncodeText | None = None,
    encode_visual: EncodeVisual | None = None,
    raw: Statistics | None = None,
    kind: str = "parquet",
    rows: int = 64,
    batch: int = 1,
    share: Share = Share(),
    dtype: torch.dtype = torch.float32,
    max_corrupt: float = MAX_CORRUPT,
    show: bool = True,
) -> Report:
    """Writes the latents (and with `encode_text` the embeddings) of this share's clips; resumes where it stopped.

    encode_visual: what image-to-video networks see of the first frame: `first_latents` [B, F, C, H, W], and maybe
    `clip` [B, L, D].

    settings: what else decides the numbers, such as the VAE's name: files of other settings are refused. raw: the VAE's
    statistics, to store latents as FastVideo does. batch: clips of one bucket encoded together. Clips that cannot be
    decoded are left out, named in the file's metadata, and end it beyond `max_corrupt`.

    Raises TooManyCorrupt, and ValueError for another job's files in `out`, an unknown kind, or latents with NaN.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"latents can be written as {' or '.join(SUFFIXES)}, not {kind!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    items = sorted(clips.plan.bucket_of)
    source = [(clips.media[item].name, str(clips.media[item].caption), clips.plan.bucket_of[item]) for item in items]
    facts = [dataclasses.asdict(clips.pace), list(map(str, clips.sizes)), str(clips.start), clips.seed]
    facts += [clips.lengths] if isinstance(clips, ImageClips) else []
    stored = [str(dtype), None if raw is None else dataclasses.asdict(raw)]
    files = Files(out, "latents", SUFFIXES[kind], len(items), rows, _digest([source, facts, stored, dict(settings)]))
    todo, report = files.missing(share), Report()
    report.there = len(range(share.index, files.count, share.count)) - len(todo)
    faults = Faults(
        max(sum(len(files.items(n)) for n in range(share.index, files.count, share.count)), 1),
        max_corrupt,
        REMEDY_BEFORE,
    )
    progress = Progress(sum(len(files.items(n)) for n in todo), desc=f"{clips.media_type}s", is_main=show)
    seen = 0
    for number in todo:
        own = [items[i] for i in files.items(number)]
        made: dict[int, Sample] = {}
        for group in _batches(own, clips, faults, batch):
            visual = partial(encode_visual, clips.video_frames(group[0][0])) if encode_visual else None
            made |= _encoded(group, encode, encode_text, visual, raw)
            progress.update(seen + len(made), {"file": number, "corrupt": len(faults.reasons)})
        seen += len(own)
        if len(made) < len(own):
            progress.update(seen, {"file": number, "corrupt": len(faults.reasons)})
        left_out = [faults.reasons[item] for item in own if item in faults.reasons]
        _write_latents(files, number, [(item, made[item]) for item in own if item in made], left_out, clips, raw, dtype)
        report.made, report.rows = report.made + 1, report.rows + len(made)
        report.corrupt += left_out
    progress.close()
    return report


def write_ode(  # noqa: PLR0913 - options of a command, by name
    prompts: Sequence[str],
    make: MakeTrajectories,
    sigmas: Sequence[float],
    out: Path,
    *,
    settings: Mapping[str, Any],
    rows: int = 64,
    batch: int = 1,
    share: Share = Share(),
    together: Callable[[int], int] | None = None,
    writes: bool = True,
    visual: Callable[[range], Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
    show: bool = True,
) -> Report:
    """Writes a teacher's trajectories of this share's prompts, at the noise levels `sigmas` [S]; resumes.

    make: draws by position (a prompt's number), so nothing depends on who makes what. settings: steps, shift, guidance,
    teacher, seed; with the prompts and levels they are the files' identity, and their metadata. together: the most of a
    number over all ranks, where `make` needs all of them (a sharded teacher): a rank that is done goes on making and
    throws it away. writes: false for the ranks that make the same as another one (a sequence group). visual: what
    trajectories of positions are made from beside their prompts (see `write_trajectories`).

    Raises ValueError for another job's files in `out`, levels that do not fall to 0, and trajectories of another size
    or with NaN.
    """
    levels = list(sigmas)
    if len(levels) < 2 or levels[-1] != 0 or levels != sorted(set(levels), reverse=True):
        raise ValueError(f"ODE: the stored noise levels must fall, and end at 0; got {levels}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    identity = _digest([list(prompts), levels, str(dtype), dict(settings)])
    files = Files(out, "ode", ".safetensors", len(prompts), rows, identity)
    todo = files.missing(share)
    report = Report(there=len(range(share.index, files.count, share.count)) - len(todo))
    parts = {number: list(_parts(files.items(number), batch)) for number in todo}
    calls = sum(map(len, parts.values()))
    progress = Progress(sum(len(files.items(n)) for n in todo), desc="ODE trajectories", is_main=show)
    most = together(calls) if together else calls
    seen, notes = 0, {"settings": json.dumps(dict(settings), default=str), IDENTITY: identity}
    for number, ranges in parts.items():
        rows_made = []
        for positions in ranges:
            x = make(positions, [prompts[i] for i in positions]).detach().cpu()
            rows_made.append(_checked(x, positions, len(levels)))
            seen += len(positions)
            progress.update(seen, {"file": number})
        captions = [prompts[i] for i in files.items(number)]
        if writes:
            write_trajectories(
                files.path(number), torch.cat(rows_made), torch.tensor(levels), captions, metadata=notes, dtype=dtype,
                visual=visual(files.items(number)) if visual else None,
            )  # fmt: skip
        report.made, report.rows = report.made + 1, report.rows + len(captions)
    for _ in range(most - calls):
        positions = range(min(batch, len(prompts)))
        make(positions, [prompts[i] for i in positions])
    progress.close()
    return report


def _batches(items: Sequence[int], clips: VideoClips, faults: Faults, batch: int) -> Iterator[list[tuple[int, Sample]]]:
    """Decoded clips of one bucket, `batch` at a time; corrupt ones are noted."""
    for bucket in sorted({clips.plan.bucket_of[item] for item in items}):
        group: list[tuple[int, Sample]] = []
        for item in items:
            if clips.plan.bucket_of[item] != bucket:
                continue
            try:
                group.append((item, clips.read(item, item)))
            except CorruptSample as problem:
                faults.add(item, problem)
            if len(group) == batch:
                yield group
                group = []
        if group:
            yield group


def _encoded(
    group: Sequence[tuple[int, Sample]],
    encode: EncodeVideo,
    encode_text: EncodeText | None,
    encode_visual: Callable[[Tensor], Mapping[str, Tensor]] | None,
    raw: Statistics | None,
) -> dict[int, Sample]:
    pixels_BTCHW = torch.stack([sample.pixels for _, sample in group if sample.pixels is not None])
    fields = {"latents": encode(pixels_BTCHW), **(encode_visual(pixels_BTCHW[:, 0]) if encode_visual else {})}
    texts = encode_text([sample.caption for _, sample in group]) if encode_text else [None] * len(group)
    out = {}
    for row, ((item, sample), text) in enumerate(zip(group, texts, strict=True)):
        own: dict[str, Any] = {name: value[row].detach().float().cpu() for name, value in fields.items()}
        for name, value in own.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"the {name} of {sample.name} hold NaN or infinity: encode in another precision")
        if raw is not None:
            own["latents"] = raw.denormalise(own["latents"])
        out[item] = dataclasses.replace(sample, pixels=None, text=None if text is None else text.cpu(), **own)
    return out


def _write_latents(
    files: Files,
    number: int,
    rows: Sequence[tuple[int, Sample]],
    left_out: Sequence[str],
    clips: VideoClips,
    raw: Statistics | None,
    dtype: torch.dtype,
) -> None:
    samples = [sample for _, sample in rows]
    notes = {IDENTITY: files.identity, "left_out": json.dumps(list(left_out))}
    path = files.path(number)
    if files.suffix == ".safetensors":
        write_latents(path, samples, normalised=raw is None, metadata=notes, dtype=dtype)
        return
    facts = []
    for item, _ in rows:
        size, info = clips.sizes[clips.plan.bucket_of[item]], clips.plan.infos[item]
        fps = 1 / clips.pace.step(info.fps)
        facts.append({"media_type": clips.media_type, "width": size.width, "height": size.height,
                      "num_frames": size.frames, "fps": fps, "duration_sec": size.frames / fps})  # fmt: skip
    write_parquet(path, samples, normalised=raw is None, metadata=notes, facts=facts, dtype=dtype)


def _checked(x: Tensor, positions: range, points: int) -> Tensor:
    if x.ndim != 6 or x.shape[:2] != (len(positions), points):
        raise ValueError(
            f"ODE: {len(positions)} trajectories of {points} points are [B, S, F, C, H, W], got {list(x.shape)}"
        )
    if not torch.isfinite(x).all():
        raise ValueError(
            f"ODE: a trajectory of prompts {positions.start} to {positions.stop - 1} holds NaN or infinity"
        )
    return x


def _parts(items: range, batch: int) -> Iterator[range]:
    return (range(start, min(start + batch, items.stop)) for start in range(items.start, items.stop, batch))


def _identity_of(path: Path) -> str | None:
    """The identity in a file's metadata; None for a damaged file, which is made again."""
    try:
        return (read_metadata(path) if path.suffix == ".parquet" else read_header(path)).get(IDENTITY)
    except ValueError:
        return None


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
