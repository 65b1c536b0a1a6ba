"""Work done once before training: videos to latents, prompts to a teacher's ODE trajectories, in files by number.

    OUT/latents_00003_of_00064.parquet     or .safetensors
    OUT/ode_00003_of_00064.safetensors

Which samples a file holds depends on its number only, so any number of processes share the files out, and one that
died is started again: a file that exists is whole, and is not made again. The networks come as callables.
"""

# B batch  T frames  F latent frames  C channels  H W size  S stored points  L text tokens  D text channels

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from utils.compared import differences
from utils.data.clips import ImageClips, VideoClips
from utils.data.parquet import read_metadata, write_parquet
from utils.data.safetensors_shards import read_header, write_latents, write_trajectories
from utils.data.stream import MAX_CORRUPT, REMEDY_BEFORE, CorruptSample, Faults, Sample
from utils.data.tensors import Statistics
from utils.logging import Progress
from utils.writing import check_writable, writing

EncodeVideo = Callable[[Tensor], Tensor]  # pixels [B, T, 3, H, W] in [0, 1] -> normalised latents [B, F, C, H, W]
# a video's number of frames, first frames [B, 3, H, W] -> Sample fields
EncodeVisual = Callable[[int, Tensor], Mapping[str, Tensor]]
EncodeText = Callable[[Sequence[str]], Sequence[Tensor]]  # captions -> embeddings [L, D] without padding
MakeTrajectories = Callable[[range, Sequence[str]], Tensor]  # positions, their prompts -> [B, S, F, C, H, W]

SUFFIXES: Final = {"parquet": ".parquet", "safetensors": ".safetensors"}
IDENTITY: Final = "fewstep.identity"


@dataclass(frozen=True)
class Share:
    """The files of this process: index, index + count, index + 2 count, ..."""

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


@dataclass(frozen=True)
class Job:
    """Where the files of a command go, and which of them are made.

    out: their folder.
    settings: what else decides the numbers, such as the VAE's name. Files of other settings are refused.
    rows: to a file.
    batch: rows made together.
    share: the files of this process.
    dtype: of the stored tensors.
    show: whether progress is shown.

    Raises ValueError for a batch of nothing.
    """

    out: Path
    settings: Mapping[str, Any]
    rows: int = 64
    batch: int = 1
    share: Share = Share()
    dtype: torch.dtype = torch.float32
    show: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")


@dataclass(frozen=True)
class Encoding:
    """What makes a row of a clip.

    video: its pixels to latents.
    text: its caption to an embedding, None to store none.
    visual: what image-to-video networks see of its first frame: `first_latents` [B, F, C, H, W], and maybe `clip`
        [B, L, D].
    raw: the VAE's statistics, to store latents as FastVideo does, None to store them normalised.
    """

    video: EncodeVideo
    text: EncodeText | None = None
    visual: EncodeVisual | None = None
    raw: Statistics | None = None


@dataclass
class Report:
    """What a call did: files made, files present before, rows written, and why it left samples out."""

    made: int = 0
    present: int = 0
    rows: int = 0
    corrupt: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Files:
    """The files of one job: `size` items, `rows` to a file. identity: what must be the same in all of them. settings:
    those behind it, which files may name."""

    out: Path
    stem: str
    suffix: str
    size: int
    rows: int
    identity: str
    settings: Mapping[str, Any] = field(default_factory=dict)

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

    def _changed(self, path: Path) -> str:
        """Which settings a file was made with that are others now, in brackets; empty where the file names none."""
        theirs = {} if path.suffix == ".parquet" else json.loads(read_header(path).get("settings", "{}"))
        changed = differences(theirs, json.loads(json.dumps(dict(self.settings), default=str))) if theirs else []
        return f" ({'; '.join(changed)})" if changed else ""

    def items(self, number: int) -> range:
        return range(number * self.rows, min((number + 1) * self.rows, self.size))

    def numbers(self, share: Share) -> range:
        """The files of a share."""
        return range(share.index, self.count, share.count)

    def missing(self, share: Share) -> list[int]:
        """The files of a share that are missing or damaged. Raises ValueError where `out` holds another job's, or can
        hold none."""
        with writing("--out", self.out):
            return self._missing(share)

    def _missing(self, share: Share) -> list[int]:
        wanted = {self.path(number).name for number in range(self.count)}
        for path in self.out.glob(f"{self.stem}_*_of_*"):
            if path.name not in wanted:
                raise ValueError(
                    f"{path} is of another job (another number of samples, rows or format): give another --out"
                )
            if _identity_of(path) not in (None, self.identity):
                raise ValueError(
                    f"{path} was made from other data or settings: give another --out, or delete this folder"
                    + self._changed(path)
                )
        paths = {number: self.path(number) for number in self.numbers(share)}
        return [number for number, path in paths.items() if not path.is_file() or _identity_of(path) is None]


def encode_videos(
    clips: VideoClips, encoding: Encoding, job: Job, *, kind: str = "parquet", max_corrupt: float = MAX_CORRUPT
) -> Report:
    """Writes the latents (and with `encoding.text` the embeddings) of this share's clips; resumes where it stopped.

    clips: the videos or images, each with its bucket.
    encoding: what makes a row of a clip.
    job: where files go and which of them are made; its batches are clips of one bucket.
    kind: of the files, a key of SUFFIXES.
    max_corrupt: share of clips that may be corrupt. They are left out, and named in the file's metadata.

    Raises TooManyCorrupt, and ValueError for another job's files in `out`, an unknown kind, or latents with NaN.
    """
    items = sorted(clips.plan.bucket_of)
    files = _latent_files(clips, items, encoding.raw, job, kind)
    todo = files.missing(job.share)
    if todo:
        check_writable(job.out, "--out", folder=True)
    numbers = files.numbers(job.share)
    report = Report(present=len(numbers) - len(todo))
    faults = Faults(max(sum(len(files.items(n)) for n in numbers), 1), max_corrupt, REMEDY_BEFORE)
    progress = Progress(sum(len(files.items(n)) for n in todo), desc=f"{clips.media_type}s", is_main=job.show)
    seen = 0
    for number in todo:
        wanted = [items[i] for i in files.items(number)]
        made: dict[int, Sample] = {}
        for group in _batches(wanted, clips, faults, job.batch):
            made |= _encoded(group, encoding, clips.video_frames(group[0][0]))
            progress.update(seen + len(made), {"file": number, "corrupt": len(faults.reasons)})
        seen += len(wanted)
        if len(made) < len(wanted):
            progress.update(seen, {"file": number, "corrupt": len(faults.reasons)})
        left_out = [faults.reasons[item] for item in wanted if item in faults.reasons]
        notes = {IDENTITY: files.identity, "left_out": json.dumps(left_out)}
        rows = [(item, made[item]) for item in wanted if item in made]
        _write_latents(files.path(number), rows, clips, notes, normalised=encoding.raw is None, dtype=job.dtype)
        report.made, report.rows = report.made + 1, report.rows + len(made)
        report.corrupt += left_out
    progress.close()
    return report


def _latent_files(clips: VideoClips, items: Sequence[int], raw: Statistics | None, job: Job, kind: str) -> Files:
    """The files of these clips. Raises ValueError for an unknown kind."""
    if kind not in SUFFIXES:
        raise ValueError(f"latents can be written as {' or '.join(SUFFIXES)}, not {kind!r}")
    source = [(clips.media[item].name, str(clips.media[item].caption), clips.plan.bucket_of[item]) for item in items]
    facts = [dataclasses.asdict(clips.pace), list(map(str, clips.sizes)), str(clips.start), clips.seed]
    facts += [clips.lengths] if isinstance(clips, ImageClips) else []
    stored = [str(job.dtype), None if raw is None else dataclasses.asdict(raw)]
    identity = _digest([source, facts, stored, dict(job.settings)])
    return Files(job.out, "latents", SUFFIXES[kind], len(items), job.rows, identity)


def write_ode(
    prompts: Sequence[str],
    make: MakeTrajectories,
    sigmas: Sequence[float],
    job: Job,
    *,
    together: Callable[[int], int] | None = None,
    writes: bool = True,
    visual: Callable[[range], Mapping[str, Tensor]] | None = None,
) -> Report:
    """Writes a teacher's trajectories of this share's prompts, at the noise levels `sigmas` [S]; resumes.

    prompts: of all trajectories; a prompt's number is its position.
    make: makes trajectories. It draws by position, so nothing depends on who makes what.
    sigmas: the stored noise levels, falling to 0.
    job: where files go and which of them are made. Its settings are steps, shift, guidance, teacher and seed.
    together: returns the largest of a number over all ranks. It is needed where `make` is collective (a sharded
        teacher): a rank that is done goes on making, and drops the result.
    writes: False for ranks that make the same trajectories as another rank (a sequence group).
    visual: what trajectories of positions are made from beside their prompts (see `write_trajectories`).

    Raises ValueError for another job's files in `out`, levels that do not fall to 0, and trajectories of another size
    or with NaN.
    """
    files = _ode_files(prompts, list(sigmas), job)
    todo = files.missing(job.share)
    if todo and writes:
        check_writable(job.out, "--out", folder=True)
    report = Report(present=len(files.numbers(job.share)) - len(todo))
    parts = {number: list(_parts(files.items(number), job.batch)) for number in todo}
    calls = sum(map(len, parts.values()))
    progress = Progress(sum(len(files.items(n)) for n in todo), desc="ODE trajectories", is_main=job.show)
    most = together(calls) if together else calls
    seen, notes = 0, {"settings": json.dumps(dict(job.settings), default=str), IDENTITY: files.identity}
    for number, ranges in parts.items():
        made = []
        for positions in ranges:
            x = make(positions, [prompts[i] for i in positions])
            made.append(_checked(x.detach().cpu(), positions, len(sigmas)))
            seen += len(positions)
            progress.update(seen, {"file": number})
        captions = [prompts[i] for i in files.items(number)]
        if writes:
            write_trajectories(
                files.path(number), torch.cat(made), torch.tensor(list(sigmas)), captions,
                metadata=notes, dtype=job.dtype, visual=visual(files.items(number)) if visual else None,
            )  # fmt: skip
        report.made, report.rows = report.made + 1, report.rows + len(captions)
    for _ in range(most - calls):
        make(range(min(job.batch, len(prompts))), list(prompts[: job.batch]))
    progress.close()
    return report


def _ode_files(prompts: Sequence[str], levels: list[float], job: Job) -> Files:
    """The files of these trajectories. Raises ValueError for levels that do not fall to 0."""
    if len(levels) < 2 or levels[-1] != 0 or levels != sorted(set(levels), reverse=True):
        raise ValueError(f"ODE: the stored noise levels must fall, and end at 0; got {levels}")
    identity = _digest([list(prompts), levels, str(job.dtype), dict(job.settings)])
    return Files(job.out, "ode", ".safetensors", len(prompts), job.rows, identity, job.settings)


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


def _encoded(group: Sequence[tuple[int, Sample]], encoding: Encoding, frames: int) -> dict[int, Sample]:
    """Rows of clips of one bucket, by item. frames: of a video, for `encoding.visual`."""
    pixels_BTCHW = torch.stack([sample.pixels for _, sample in group if sample.pixels is not None])
    fields = {"latents": encoding.video(pixels_BTCHW)}
    if encoding.visual is not None:
        fields |= encoding.visual(frames, pixels_BTCHW[:, 0])
    texts = encoding.text([sample.caption for _, sample in group]) if encoding.text else [None] * len(group)
    out = {}
    for row, ((item, sample), text) in enumerate(zip(group, texts, strict=True)):
        tensors: dict[str, Any] = {name: value[row].detach().float().cpu() for name, value in fields.items()}
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"the {name} of {sample.name} hold NaN or infinity: encode in another precision")
        if encoding.raw is not None:
            tensors["latents"] = encoding.raw.denormalise(tensors["latents"])
        out[item] = dataclasses.replace(sample, pixels=None, text=None if text is None else text.cpu(), **tensors)
    return out


def _write_latents(
    path: Path,
    rows: Sequence[tuple[int, Sample]],
    clips: VideoClips,
    notes: Mapping[str, str],
    *,
    normalised: bool,
    dtype: torch.dtype,
) -> None:
    """Writes one file.

    path: of the file.
    rows: items and their samples.
    clips: say size and rate of each item.
    notes: the file's metadata.
    normalised: whether latents are.
    dtype: of the stored tensors.
    """
    samples = [sample for _, sample in rows]
    if path.suffix == SUFFIXES["safetensors"]:
        write_latents(path, samples, normalised=normalised, metadata=notes, dtype=dtype)
        return
    facts = []
    for item, _ in rows:
        size, info = clips.sizes[clips.plan.bucket_of[item]], clips.plan.infos[item]
        fps = 1 / clips.pace.step(info.fps)
        facts.append({"media_type": clips.media_type, "width": size.width, "height": size.height,
                      "num_frames": size.frames, "fps": fps, "duration_sec": size.frames / fps})  # fmt: skip
    write_parquet(path, samples, normalised=normalised, metadata=notes, facts=facts, dtype=dtype)


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
