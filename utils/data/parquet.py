"""Latents and ODE trajectories in parquet files, in FastVideo's column layout.

A tensor is three columns, `{name}_bytes`, `{name}_shape`, `{name}_dtype`; of these `vae_latent` [C, F, H, W],
`text_embedding` [L, D], and for I2V `first_frame_latent` [C, F, H, W] and `clip_feature` [L, D]; of a trajectory
`trajectory_latents` [S, C, F, H, W] and `trajectory_timesteps` [S]. FastVideo's `vae_latent` is the VAE's raw one and
is normalised in training; ours say so in the file's metadata (`fewstep.normalised`). `first_frame_latent`, which its
network sees as it is stored, is normalised in its files and in ours. Ours are [F, C, H, W] in a Sample. FastVideo's I2V
layout has a `pil_image` too, which it leaves empty, and so do we.
"""

# F latent frames  C channels  H W latent size  L text tokens  D text channels  S stored points

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from utils.data.shard_files import arrow, check_group, column_values, found_files, whole
from utils.data.stream import CorruptSample, Sample
from utils.data.tensors import Statistics, finite, from_row, to_row
from utils.fields import show
from utils.limits import check_size
from utils.reading import reading
from utils.writing import whole_file

NORMALISED: Final = b"fewstep.normalised"
_TENSORS: Final = ("vae_latent", "text_embedding", "first_frame_latent", "clip_feature")
_TRAJECTORY: Final = ("trajectory_latents", "trajectory_timesteps")
_TEXT: Final = ("id", "file_name", "caption", "media_type")
_CAPTIONS: Final = ("caption", "prompt")
_WHOLE: Final = ("width", "height", "num_frames")
_REAL: Final = ("duration_sec", "fps")
TIMESTEPS: Final = 1000.0  # FastVideo stores timesteps, we speak of sigma


class ParquetFolder:
    """Parquet files under a folder (or one file), row group by row group: a group is what one read brings, a shard.

    statistics: normalises latents that are stored raw; needed unless the files say that theirs are normalised.
    normalised: overrides what the files say, for files of neither kind. cached: row groups kept in memory; FastVideo's
    are whole files, and with no fewer of them than the order's pool each is read once an epoch.

    Raises ValueError for a folder without rows, a file that is no parquet, columns that are missing, and raw latents
    without statistics.
    """

    def __init__(
        self,
        path: str | Path,
        statistics: Statistics | None = None,
        normalised: bool | None = None,
        *,
        cached: int = 4,
    ) -> None:
        self.path, self.statistics = Path(path), statistics
        self.groups: list[tuple[Path, int]] = []
        self.shard_sizes: list[int] = []
        self.raw: dict[Path, bool] = {}
        for file in whole(found_files(self.path, ".parquet"), self.path):
            self._index(file, normalised)
        if not sum(self.shard_sizes):
            raise ValueError(f"data: {self.path} holds no parquet row")
        self._first = [0]
        for size in self.shard_sizes:
            self._first.append(self._first[-1] + size)
        if any(self.raw.values()) and statistics is None:
            raise ValueError(
                f"data: {self.path} holds raw VAE latents, as FastVideo writes them: give the VAE's latents_mean and "
                "latents_std, or say that they are normalised"
            )
        self._table = functools.lru_cache(maxsize=cached)(self._read_group)

    def read(self, item: int, position: int) -> Sample:
        """The row `item`, counted through all files. Raises CorruptSample."""
        del position  # nothing is drawn
        group = bisect_right(self._first, item) - 1
        file, number = self.groups[group]
        place = item - self._first[group]
        where = f"{file}, row group {number}, row {place}"
        with reading("", where, "", error=CorruptSample):
            row = self._table(group).slice(place, 1).to_pylist()[0]
            return self._sample(row, where, self.raw[file])

    def shapes(self) -> list[tuple[int, ...]]:
        """The latents' shape (F, C, H, W) of every row, from the shape column alone: to make buckets of."""
        _, pq = arrow()
        out: list[tuple[int, ...]] = []
        for file in dict.fromkeys(file for file, _ in self.groups):
            with reading("data", file), pq.ParquetFile(file) as opened:
                for shape in column_values(opened, "vae_latent_shape", f"data: {file}"):
                    c, *f, h, w = shape if shape and len(shape) in (3, 4) else (0, 0, 0, 0)
                    out.append((f[0] if f else 1, c, h, w))
        return out

    def captions(self) -> list[str]:
        """The caption of every row, from its column alone."""
        _, pq = arrow()
        out: list[str] = []
        for file in dict.fromkeys(file for file, _ in self.groups):
            with reading("data", file), pq.ParquetFile(file) as opened:
                names = [name for name in _CAPTIONS if name in opened.schema_arrow.names]
                columns = [column_values(opened, name, f"data: {file}") for name in names or ["id"]]
                rows = [dict(zip(names, row, strict=False)) for row in zip(*columns, strict=True)]
                out += [_caption(row, f"data: {file}") for row in rows]
        return out

    def _index(self, file: Path, normalised: bool | None) -> None:
        _, pq = arrow()
        with reading("data", file, says="is no parquet file"), pq.ParquetFile(file) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            check_size("rows", metadata.num_rows, f"data: {file}", unit="rows")
        names = set(schema.names)
        if not {"vae_latent_bytes", "trajectory_latents_bytes"} & names:
            raise ValueError(
                f"data: {file} has neither vae_latent_bytes nor trajectory_latents_bytes, it has {schema.names[:8]}"
            )
        said = (schema.metadata or {}).get(NORMALISED) == b"true"
        is_trajectory = "trajectory_latents_bytes" in names  # the sampler's states: normalised, and all that is read
        self.raw[file] = not is_trajectory and not (said if normalised is None else normalised)
        for group in range(metadata.num_row_groups):
            self.groups.append((file, group))
            self.shard_sizes.append(metadata.row_group(group).num_rows)

    def _read_group(self, group: int) -> Any:
        file, number = self.groups[group]
        with arrow()[1].ParquetFile(file) as opened:
            present = opened.schema_arrow.names
            fields = [*_TENSORS[1:], *_TRAJECTORY] if f"{_TRAJECTORY[0]}_bytes" in present else _TENSORS
            wanted = [f"{name}_{part}" for name in fields for part in ("bytes", "shape", "dtype")]
            columns = [name for name in ("id", *_CAPTIONS, *wanted) if name in present]
            check_group(opened.metadata, number, columns, f"{file}, row group {number}")
            return opened.read_row_group(number, columns=columns)

    def _sample(self, row: Mapping[str, Any], where: str, raw: bool) -> Sample:
        name = f"{where} ({row['id']})" if row.get("id") else where
        latent, text, first, clip = (from_row(field, row, name) for field in _TENSORS)
        trajectory, timesteps = (from_row(field, row, name) for field in _TRAJECTORY)
        if latent is None and trajectory is None:
            raise CorruptSample(f"{name} has no latents")
        points = None if trajectory is None else _points(trajectory, name)
        return Sample(
            name=name,
            caption=_caption(row, name),
            text=_tokens(text, f"{name}: text"),
            latents=self._frames_first(latent, name, raw) if points is None else points[-1],
            first_latents=self._frames_first(first, name, raw=False),
            clip=_tokens(clip, f"{name}: clip"),
            trajectory=points,
            sigmas=None if timesteps is None else left_levels(finite(timesteps.float(), f"{name}: timesteps")),
        )

    def _frames_first(self, latents: Tensor | None, name: str, raw: bool) -> Tensor | None:
        """[C, F, H, W] or [C, H, W] as stored to normalised [F, C, H, W]."""
        if latents is None:
            return None
        latents = latents.unsqueeze(1) if latents.ndim == 3 else latents
        if latents.ndim != 4:
            raise CorruptSample(f"{name}: latents must be [C, F, H, W], got {list(latents.shape)}")
        out = finite(latents, f"{name}: latents").transpose(0, 1).contiguous().float()
        try:
            return self.statistics.normalise(out) if raw and self.statistics else out
        except ValueError as problem:
            raise CorruptSample(f"{name}: {problem}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_parquet` was given as metadata. Raises ValueError for a damaged file."""
    _, pq = arrow()
    with reading("data", path, says="is no parquet file"):
        found = pq.read_schema(path).metadata or {}
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}


def left_levels(timesteps: Tensor) -> Tensor:
    """Noise levels [S] of FastVideo's stored states, of its timesteps [S] in 0..1000.

    FastVideo stores the state *after* each step beside the timestep that the step began at. So a state's own level is
    the next one's timestep, and the last state is clean.
    """
    sigmas = timesteps.reshape(-1).double() / TIMESTEPS
    return torch.cat([sigmas[1:], sigmas.new_zeros(1)]).float()


def write_parquet(
    path: Path,
    samples: Iterable[Sample],
    *,
    normalised: bool,
    metadata: Mapping[str, str] | None = None,
    facts: Sequence[Mapping[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
    rows_per_group: int = 1,
) -> None:
    """Writes latents in FastVideo's T2V (or, with `first_latents` or `clip`, I2V) layout; the file appears whole.

    path: of the file.
    samples: its rows.
    normalised: whether latents are; first frames always are. FastVideo reads raw ones.
    metadata: of the file.
    facts: what else a row says (width, height, num_frames, duration_sec, fps, media_type).
    dtype: of the stored tensors. FastVideo reads float32.
    rows_per_group: 1 by default: random reads then bring no other rows.
    """
    pa, pq = arrow()
    rows = []
    for number, sample in enumerate(samples):
        if sample.latents is None:
            raise ValueError(f"data: {sample.name} has no latents to write to {path}")
        row: dict[str, Any] = {"id": sample.name, "file_name": sample.name, "caption": sample.caption}
        row |= {"media_type": "video"} | dict(facts[number] if facts else {})
        first = None if sample.first_latents is None else sample.first_latents.transpose(0, 1)
        for name, tensor in zip(
            _TENSORS, (sample.latents.transpose(0, 1), sample.text, first, sample.clip), strict=True
        ):
            row |= {} if tensor is None else to_row(name, tensor.to(dtype))
        rows.append(row)
    tensors = _TENSORS if any(f"{name}_bytes" in row for name in _TENSORS[2:] for row in rows) else _TENSORS[:2]
    notes = {NORMALISED: b"true" if normalised else b"false"}
    notes |= {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    if tensors is _TENSORS:
        rows = [{"pil_image_bytes": b"", "pil_image_shape": [], "pil_image_dtype": ""} | row for row in rows]
    table = pa.Table.from_pylist(rows, schema=pa.schema(_fields(tensors), metadata=notes))
    with whole_file(path) as partial:
        pq.write_table(table, partial, row_group_size=rows_per_group, compression="zstd")


def _fields(tensors: Sequence[str]) -> list[Any]:
    pa, _ = arrow()
    out = [pa.field("id", pa.string())]
    for name in [*tensors, *(["pil_image"] if len(tensors) > 2 else [])]:
        out.append(pa.field(f"{name}_bytes", pa.binary()))
        out.append(pa.field(f"{name}_shape", pa.list_(pa.int64())))
        out.append(pa.field(f"{name}_dtype", pa.string()))
    out += [pa.field(name, pa.string()) for name in _TEXT[1:]]
    out += [pa.field(name, pa.int64()) for name in _WHOLE]
    return out + [pa.field(name, pa.float64()) for name in _REAL]


def _tokens(tensor: Tensor | None, where: str) -> Tensor | None:
    """[L, D] as stored, or with a batch of one before it. Raises CorruptSample."""
    if tensor is None:
        return None
    tensor = tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor
    return finite(tensor, where)


def _caption(row: Mapping[str, Any], where: str) -> str:
    """Raises CorruptSample for what is no text."""
    found = next((row[name] for name in _CAPTIONS if row.get(name)), "")
    if not isinstance(found, str):
        raise CorruptSample(f"{where} has a caption {show(found)}, which is no text")
    return found


def _points(trajectory: Tensor, name: str) -> Tensor:
    """[S, C, F, H, W] as stored, or with a batch of one before it, to [S, F, C, H, W]."""
    trajectory = trajectory[0] if trajectory.ndim == 6 and trajectory.shape[0] == 1 else trajectory
    if trajectory.ndim != 5:
        raise CorruptSample(f"{name}: a trajectory must be [S, C, F, H, W], got {list(trajectory.shape)}")
    return finite(trajectory, f"{name}: trajectory").transpose(1, 2).contiguous().float()
