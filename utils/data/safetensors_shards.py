"""Latents and ODE trajectories in safetensors shards: what preprocessing writes, and what is read one row at a time.

    latents:       `{row}.latents` [F, C, H, W] of any size, `{row}.text` [L, D], `{row}.first_latents`, `{row}.clip`
    trajectories:  `x` [N, S, F, C, H, W] and `sigma` [S]: from noise to clean, and the noise level of each point; for
                   image-to-video `first_latents` [N, F, C, H, W] and `clip` [N, L, D]

Names and captions are JSON in the file's metadata, under `names` and `captions`.
"""

# N rows  S stored points  F latent frames  C channels  H W latent size  L text tokens  D text channels

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from utils.data.shard_files import found_files, whole
from utils.data.stream import CorruptSample, Sample
from utils.data.tensors import Statistics, finite
from utils.errors import UserError
from utils.reading import reading
from utils.tensor_files import save_file
from utils.writing import whole_file

LATENTS: Final = "fewstep latents 1"
TRAJECTORIES: Final = "fewstep trajectories 1"
_VISUAL: Final = ("first_latents", "clip")
_FIELDS: Final = ("latents", "text", *_VISUAL)


class SafetensorsFolder:
    """Shards of latents or of trajectories; a read maps the file and takes one row of it.

    statistics: normalises latents that were stored raw. Raises ValueError for a folder without rows, a file that is no
    shard of ours, shards of both kinds or of several noise levels, and raw latents without statistics.
    """

    def __init__(self, path: str | Path, statistics: Statistics | None = None) -> None:
        self.path, self.statistics = Path(path), statistics
        self.files = whole(found_files(self.path, ".safetensors"), self.path)
        self.headers = [read_header(file) for file in self.files]
        self.shard_sizes = [len(header["captions"]) for header in self.headers]
        kinds = {header["format"] for header in self.headers}
        if len(kinds) > 1:
            raise ValueError(
                f"data: {self.path} mixes shards of {' and '.join(sorted(kinds))}: give one folder for each"
            )
        if not sum(self.shard_sizes):
            raise ValueError(f"data: the shards of {self.path} hold no row")
        self.is_trajectory = kinds == {TRAJECTORIES}
        raw = [
            file for file, header in zip(self.files, self.headers, strict=True) if header.get("normalised") == "false"
        ]
        if raw and statistics is None:
            raise ValueError(f"data: {raw[0]} holds raw VAE latents: give the VAE's latents_mean and latents_std")
        self._raw = set(raw)
        self._first = [0]
        for size in self.shard_sizes:
            self._first.append(self._first[-1] + size)
        self.sigmas = self._levels() if self.is_trajectory else None

    def read(self, item: int, position: int) -> Sample:
        """The row `item`, counted through all shards. Raises CorruptSample."""
        del position  # nothing is drawn
        number = bisect_right(self._first, item) - 1
        row, file, header = item - self._first[number], self.files[number], self.headers[number]
        where = f"{file}, row {row}"
        name = header["names"][row] or where
        with reading("", where, "", error=CorruptSample), safe_open(file, "pt") as opened:
            keys = set(opened.keys())
            if self.is_trajectory:
                x = finite(opened.get_slice("x")[row], where).float()
                visual = {f: finite(opened.get_slice(f)[row], f"{where}: {f}").float() for f in _VISUAL if f in keys}
                return Sample(name, header["captions"][row], latents=x[-1], trajectory=x, sigmas=self.sigmas, **visual)
            found = {
                f: finite(opened.get_tensor(f"{row}.{f}"), f"{where}: {f}") for f in _FIELDS if f"{row}.{f}" in keys
            }
        if "latents" not in found:
            raise CorruptSample(f"{where} has no latents")
        found["latents"] = self._normalised(found["latents"], file, where)
        if "first_latents" in found:  # normalised in any file
            found["first_latents"] = found["first_latents"].float()
        return Sample(name, header["captions"][row], **found)

    def shapes(self) -> list[tuple[int, ...]]:
        """The latents' shape (F, C, H, W) of every row, from the headers alone: to make buckets of."""
        out: list[tuple[int, ...]] = []
        for file, size in zip(self.files, self.shard_sizes, strict=True):
            with reading("data", file), safe_open(file, "pt") as opened:
                if self.is_trajectory:
                    out += [tuple(opened.get_slice("x").get_shape()[2:])] * size
                else:
                    out += [tuple(opened.get_slice(f"{row}.latents").get_shape()) for row in range(size)]
        return out

    def captions(self) -> list[str]:
        """The caption of every row."""
        return [caption for header in self.headers for caption in header["captions"]]

    def _normalised(self, latents: Tensor, file: Path, where: str) -> Tensor:
        out = latents.float()
        if file not in self._raw or self.statistics is None:
            return out
        try:
            return self.statistics.normalise(out)
        except ValueError as problem:
            raise CorruptSample(f"{where}: {problem}") from None

    def _levels(self) -> Tensor:
        """The noise levels that all shards share."""
        levels = []
        for file in self.files:
            with reading("data", file), safe_open(file, "pt") as opened:
                level = finite(opened.get_tensor("sigma"), f"data: {file}: sigma")
                stored = opened.get_slice("x").get_shape()
                if len(stored) != 6 or list(level.shape) != stored[1:2]:
                    raise UserError(f"data: {file} has trajectories {stored} at noise levels {list(level.shape)}")
                levels.append(level.float())
        other = next((i for i, level in enumerate(levels) if not torch.equal(level, levels[0])), None)
        if other is not None:
            raise ValueError(
                f"data: {self.files[other]} stores the noise levels {levels[other].tolist()}, "
                f"{self.files[0].name} {levels[0].tolist()}: give one folder for each"
            )
        return levels[0]


def read_header(file: Path) -> dict[str, Any]:
    """A shard's metadata, names and captions as lists. Raises ValueError for a file that is no shard of ours."""
    with reading("data", file, says="is no shard of latents or trajectories"), safe_open(file, "pt") as opened:
        header: dict[str, Any] = dict(opened.metadata() or {})
        if header.get("format") not in (LATENTS, TRAJECTORIES):
            raise ValueError("its metadata names no format of ours")
        header["names"], header["captions"] = json.loads(header["names"]), json.loads(header["captions"])
        for name in ("names", "captions"):
            if not isinstance(header[name], list) or not all(isinstance(text, str) for text in header[name]):
                raise ValueError(f"its {name} are no list of texts")
            "".join(header[name]).encode()  # JSON may hold what UTF-8 cannot
        if len(header["names"]) != len(header["captions"]):
            raise ValueError(f"it has {len(header['names'])} names and {len(header['captions'])} captions")
    return header


def write_latents(
    path: Path,
    samples: Sequence[Sample],
    *,
    normalised: bool,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes one shard of latents; the file appears whole.

    path: of the file.
    samples: its rows.
    normalised: whether their latents are.
    metadata: of the file.
    dtype: of the stored tensors.

    Raises ValueError for a sample without latents.
    """
    tensors: dict[str, Tensor] = {}
    for row, sample in enumerate(samples):
        if sample.latents is None:
            raise ValueError(f"data: {sample.name} has no latents to write to {path}")
        for name in _FIELDS:
            value = getattr(sample, name)
            if value is not None:
                tensors[f"{row}.{name}"] = value.detach().to("cpu", dtype).contiguous()
    header = {"format": LATENTS, "normalised": "true" if normalised else "false", **(metadata or {})}
    _write(path, tensors, header, [s.name for s in samples], [s.caption for s in samples])


def write_trajectories(
    path: Path,
    x_NSFCHW: Tensor,
    sigmas_S: Tensor,
    captions: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    visual: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes one shard of trajectories; the file appears whole.

    path: of the file.
    x_NSFCHW: states of N trajectories at S noise levels.
    sigmas_S: the noise levels.
    captions: of the trajectories.
    names: of the trajectories, None for no names.
    metadata: of the file.
    dtype: of the stored tensors.
    visual: what they were made from beside their captions: `first_latents` [N, F, C, H, W], `clip` [N, L, D].

    Raises ValueError where the sizes do not agree.
    """
    if x_NSFCHW.ndim != 6 or x_NSFCHW.shape[:2] != (len(captions), len(sigmas_S)):
        raise ValueError(
            f"data: {len(captions)} trajectories at {len(sigmas_S)} levels are [N, S, F, C, H, W], "
            f"got {list(x_NSFCHW.shape)}"
        )
    tensors = {"x": x_NSFCHW.detach().to("cpu", dtype).contiguous(), "sigma": sigmas_S.detach().cpu().float()}
    for name, tensor in (visual or {}).items():
        if name not in _VISUAL or len(tensor) != len(captions):
            raise ValueError(f"data: {name} {list(tensor.shape)} is not {' or '.join(_VISUAL)} of {len(captions)} rows")
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    header = {"format": TRAJECTORIES, **(metadata or {})}
    _write(path, tensors, header, names or [""] * len(captions), captions)


def _write(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], names: Sequence[str], captions: Sequence[str]
) -> None:
    notes = {**header, "names": json.dumps(list(names)), "captions": json.dumps(list(captions))}
    with whole_file(path) as partial:
        save_file(dict(tensors), partial, notes)
