"""Wan DiT weights to files, under Wan's own names or Diffusers', one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.export import SHARD_BYTES, Dtype, Format
from model.wan.config import WanConfig
from model.wan.formats import to_diffusers_key
from model.wan.geometry import diffusers_config, native_config
from model.wan.quantised import FILE_MARK, SCALES
from model.weights import Weights
from utils.shards import write_stream

STEM = "diffusion_pytorch_model"  # the name in Wan's own repositories and in Diffusers'
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
BIG = re.compile(r"blocks\.\d+\..*\.weight")  # with two dimensions: norms, modulation and embeddings keep 16 bits

Kind = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Item:
    """One tensor of the file and the parameter that it is made of; is_scale: the scale of that parameter's fp8."""

    source: str
    kind: Kind
    is_scale: bool = False


def fp8_scale(value: Tensor) -> Tensor:
    """The power of two by which an fp8 matrix is to be multiplied, fp32, 0-d: its largest entry lands in (224, 448].

    fp8 has few exponents, and Wan's weights are small: unscaled, most would be rounded as subnormals. A power of two
    keeps `fp8 * scale` exact in bf16.
    """
    largest = float(value.abs().max())
    if not 0 < largest < math.inf:
        return torch.tensor(1.0)
    mantissa, exponent = math.frexp(largest / FP8_MAX)  # exact, as log2 is not
    return torch.tensor(2.0 ** (exponent if mantissa > 0.5 else exponent - 1))


def items_of(weights: Weights, names: Format, dtype: Dtype) -> dict[str, Item]:
    """What a file will hold, by its name there.

    Wan's own names get fp8 as ComfyUI reads it: `X.scale_weight` beside each `X.weight`, and a marker `scaled_fp8`.
    Diffusers knows no scales: it gets plain casts, as its own layerwise casting makes them.
    """
    out: dict[str, Item] = {}
    for name, shape in weights.shapes.items():
        big = dtype is Dtype.fp8 and len(shape) == 2 and BIG.fullmatch(name) is not None
        kind = FP8 if big else torch.float32 if dtype is Dtype.fp32 else torch.bfloat16
        out[name if names is Format.NATIVE else to_diffusers_key(name)] = Item(name, (kind, shape))
        if big and names is Format.NATIVE:
            out[f"{name.removesuffix('weight')}{SCALES[0]}"] = Item(name, (torch.float32, ()), is_scale=True)
    return out


def save_weights(
    folder: Path, weights: Weights, names: Format, dtype: Dtype, shard_bytes: int | None = SHARD_BYTES
) -> list[Path]:
    """Writes weights: one file, or shards and their index.

    folder: where the files go.
    weights: the weights to write.
    names: the layout whose names they get.
    dtype: the type they are stored in.
    shard_bytes: the most that a shard holds, None for one file.
    Raises OSError when they cannot be written, ValueError for weights beyond fp8's range.
    """
    items = items_of(weights, names, dtype)
    shards = _split(items, shard_bytes)
    scaled = any(item.is_scale for item in items.values())
    total, files = 0, []
    where: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = folder / f"{STEM}{suffix}.safetensors"
        kinds = {name: items[name].kind for name in part}
        if scaled and number == 1:
            kinds[FILE_MARK] = (FP8, (2,))  # two elements: multiply in 16 bits; ComfyUI reads one or none as in fp8
        write_stream(file, kinds, lambda order: _values(weights, items, order, scaled), {"format": "pt"})
        total += sum(_bytes(kind) for kind in kinds.values())
        where |= dict.fromkeys(kinds, file.name)
        files.append(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return files


def _split(items: dict[str, Item], shard_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, item in items.items():
        size = _bytes(item.kind)
        if shard_bytes is not None and shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _bytes(kind: Kind) -> int:
    return kind[0].itemsize * math.prod(kind[1])


def _values(weights: Weights, items: dict[str, Item], order: Iterable[str], scaled: bool) -> Iterator[Tensor]:
    for name in order:
        if name == FILE_MARK:
            yield torch.zeros(2, dtype=FP8)
            continue
        item = items[name]
        ((_, value),) = weights.read([item.source])
        if item.is_scale:
            yield fp8_scale(value.float())
        elif item.kind[0] is FP8:
            yield _to_fp8(item.source, value.float(), scaled)
        else:
            yield value.to("cpu", item.kind[0]).contiguous()


def _to_fp8(name: str, value: Tensor, scaled: bool) -> Tensor:
    if scaled:
        value = value / fp8_scale(value)
    # not <=, so that NaN is refused too
    if not float(value.abs().max()) <= FP8_MAX:
        raise ValueError(f"{name} has values beyond fp8's {FP8_MAX:g}: export it in bf16")
    return value.to("cpu", FP8).contiguous()


def save_model(
    folder: Path,
    weights: Weights,
    config: WanConfig,
    names: Format,
    dtype: Dtype,
    shard_bytes: int | None = SHARD_BYTES,
) -> None:
    """A folder that Wan's code, ComfyUI or Diffusers loads: the weights and config.json. Raises as `save_weights`,
    which has the other arguments.

    config: geometry of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, weights, names, dtype, shard_bytes)
    values = native_config(config) if names is Format.NATIVE else diffusers_config(config)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
