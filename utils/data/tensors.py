"""Tensors as raw bytes beside shape and dtype, as parquet rows and LMDB values hold them; the statistics of latents."""

# F latent frames  C channels  H W latent size

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.data.stream import CorruptSample
from utils.fields import show
from utils.reading import reading
from utils.shards import is_finite

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool
)}  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of each channel of a VAE's raw latents: `latents_mean`, `latents_std` of its config."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(std > 0 for std in self.std):
            raise ValueError(f"latent statistics: need as many positive std as mean, got {self.mean} and {self.std}")

    def normalise(self, latents_FCHW: Tensor) -> Tensor:
        """(x - mean) / std, fp32. Raises ValueError for another number of channels."""
        mean, std = self._shaped(latents_FCHW)
        return (latents_FCHW.float() - mean) / std

    def denormalise(self, latents_FCHW: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._shaped(latents_FCHW)
        return latents_FCHW.float() * std + mean

    def _shaped(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.shape[-3] != len(self.mean):
            raise ValueError(f"latents {list(latents.shape)} have not the {len(self.mean)} channels of the statistics")
        shape = (-1, 1, 1)
        return torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)


def to_row(field: str, tensor: Tensor) -> dict[str, Any]:
    """The three columns `{field}_bytes`, `_shape` and `_dtype` of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    return {
        f"{field}_bytes": tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
        f"{field}_shape": list(tensor.shape),
        f"{field}_dtype": str(tensor.dtype).removeprefix("torch."),
    }


def from_row(field: str, row: Mapping[str, Any], where: str) -> Tensor | None:
    """The tensor of a row, None where the row has none (no such column, null, or no bytes).

    FastVideo's readers take every tensor for float32 whatever its dtype column says, so bytes that fit float32 and not
    the named dtype are float32. Raises CorruptSample where bytes, shape and dtype do not fit together.
    """
    data, shape = row.get(f"{field}_bytes"), row.get(f"{field}_shape")
    if not data:
        return None
    if shape is None:
        raise CorruptSample(f"{where}: {field} has bytes and no shape")
    return from_bytes(data, shape, str(row.get(f"{field}_dtype") or "float32"), f"{where}: {field}")


def from_bytes(data: bytes, shape: Sequence[int], dtype: str, where: str) -> Tensor:
    """A tensor of its own memory. Raises CorruptSample; see `from_row` on float32."""
    known = _DTYPES.get(dtype.removeprefix("torch."))
    if known is None:
        raise CorruptSample(f"{where} has dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    with reading("", where, "", error=CorruptSample):
        if not all(isinstance(side, int) and side > 0 for side in shape):
            raise CorruptSample(f"{where} has the shape {show(list(shape))}")
        numbers = math.prod(shape)
        if len(data) != numbers * known.itemsize:
            if len(data) != numbers * 4:
                raise CorruptSample(f"{where} has {len(data)} bytes, and {show(list(shape))} in {dtype} needs "
                                    f"{numbers * known.itemsize}")  # fmt: skip
            known = torch.float32
        return torch.frombuffer(bytearray(data), dtype=known).reshape(tuple(shape))


def finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor. Raises CorruptSample if it holds NaN or infinity, or other numbers than real ones."""
    if not tensor.is_floating_point():
        raise CorruptSample(f"{where} is of {tensor.dtype}, and not of real numbers")
    if not is_finite(tensor):
        raise CorruptSample(f"{where} holds NaN or infinity")
    return tensor
