"""Matrices that are stored in eight bits, and the scales beside them that say which numbers they stand for.

`weight = stored * scale`. The scale is one number, one for each output ([out] or [out, 1]), or one for each block
([rows, columns]). Kijai's and ComfyUI's older files call it `scale_weight`, LightX2V and ComfyUI `weight_scale`, others
`weight_scale_inv`, which is a factor as well. Fp8 without a scale is a plain cast.

ComfyUI marks a layer by its format, in a tensor `comfy_quant` of JSON or in the file's header.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.weights import Stored
from utils.reading import reading

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BITS = (*FP8, torch.int8)
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
NO_WEIGHTS = ("scale_input", "input_scale")  # of quantised activations, which we do not have
FILE_MARK, LAYER_MARK = "scaled_fp8", "comfy_quant"
KNOWN = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # ComfyUI's formats, without a rotation
REMEDY = "take the bf16 or fp8 file of the same weights"
_LARGEST_MARK = 4096  # bytes


def dequantised(named: Mapping[str, Stored], formats: Mapping[str, str]) -> dict[str, Stored]:
    """Weights by name, whose matrices in eight bits are read as the fp32 numbers that they stand for. Scales and marks
    are none of them.

    formats: JSON of layers, as the file's header has it.

    Raises ValueError, from headers alone, for a format that is not known, a matrix of whole numbers without a scale,
    and a scale without its matrix or of a shape that does not fit it.
    """
    marks = {name.rpartition(".")[0]: stored for name, stored in named.items() if _leaf(name) == LAYER_MARK}
    for layer, text in {**formats, **{layer: _text(layer, stored) for layer, stored in marks.items()}}.items():
        _check_format(layer, text)
    scales = {f"{name.rpartition('.')[0]}.weight": name for name in named if _leaf(name) in SCALES}
    left_out = {FILE_MARK, LAYER_MARK, *SCALES, *NO_WEIGHTS}
    out = {name: stored for name, stored in named.items() if _leaf(name) not in left_out}
    for name, stored in out.items():
        real = stored.dtype is None or stored.dtype.is_floating_point or stored.dtype in EIGHT_BITS
        if not real and math.prod(stored.shape) > 1:
            raise ValueError(f"{name} is of {stored.dtype}, and weights are real numbers: {REMEDY}")
    for weight, scale in scales.items():
        if weight not in out or out[weight].dtype not in EIGHT_BITS:
            kind = "is not there" if weight not in out else f"is of {out[weight].dtype}"
            raise ValueError(f"{scale} is a scale, and {weight} {kind}: a part of the file is missing: fetch it again")
    eight = {name: stored for name, stored in out.items() if stored.dtype in EIGHT_BITS}
    return out | {name: _scaled(name, stored, named.get(scales.get(name, ""))) for name, stored in eight.items()}


def _scaled(name: str, stored: Stored, scale: Stored | None) -> Stored:
    if scale is None:
        if stored.dtype not in FP8:
            raise ValueError(f"{name} is of {stored.dtype} and has no scale beside it: {REMEDY}")
        return Stored(stored.shape, lambda: stored.read().float())
    if scale.dtype is not None and not scale.dtype.is_floating_point:
        raise ValueError(f"the scale of {name} is of {scale.dtype}, as MXFP8 has it, which is not known: {REMEDY}")
    if not _fits(scale.shape, stored.shape):
        raise ValueError(
            f"the scale of {name} {list(stored.shape)} is {list(scale.shape)}, which fits no block: {REMEDY}"
        )
    return Stored(stored.shape, functools.partial(_product, stored, scale))


def _product(stored: Stored, scale: Stored) -> Tensor:
    assert stored.raw is not None
    integers = stored.dtype not in FP8
    value = (stored.raw() if integers else stored.read()).float()
    factor = scale.read().float()
    if factor.numel() == 1:
        return value * factor.reshape(())
    if factor.ndim == 1:
        factor = factor[:, None]
    if factor.shape[1] == 1 and factor.shape[0] == value.shape[0]:
        return value * factor
    rows, columns = _block(value.shape, tuple(factor.shape))
    whole = factor.repeat_interleave(rows, 0)[: value.shape[0]].repeat_interleave(columns, 1)[:, : value.shape[1]]
    return value * whole


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale of this shape is one number, one of each output, or one of each block."""
    if math.prod(scale) == 1:
        return True
    if len(weight) != 2 or len(scale) > 2:
        return False
    shape = (*scale, 1)[:2]
    if shape == (weight[0], 1):
        return True
    blocks = _block(weight, shape)
    used = tuple(math.ceil(size / block) for size, block in zip(weight, blocks, strict=True))
    return len(scale) == 2 and used == shape


def _block(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a block; the last ones may be cut."""
    rows, columns = (math.ceil(size / max(count, 1)) for size, count in zip(weight, scale, strict=True))
    return rows, columns


def _text(layer: str, stored: Stored) -> str:
    if stored.dtype is not torch.uint8 or stored.raw is None or math.prod(stored.shape) > _LARGEST_MARK:
        raise ValueError(f"{layer}.{LAYER_MARK} is no mark of ComfyUI: {REMEDY}")
    return bytes(stored.raw().flatten().tolist()).decode(errors="replace")


def _check_format(layer: str, text: str) -> None:
    with reading("weights", f"{layer}: its format", REMEDY):
        said = dict(json.loads(text))
    name = said.get("format")
    if name not in KNOWN:
        raise ValueError(f"{layer} is stored as {name!r}, which is not known: {REMEDY}")
    if said.get("convrot"):
        raise ValueError(f"{layer} is stored as {name} of rotated weights (convrot), which is not known: {REMEDY}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
