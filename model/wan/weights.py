"""Wan DiT weights from anywhere (see `located`), under Wan's own names or Diffusers', read one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from model.export import Format
from model.wan.config import WanConfig
from model.wan.formats import GATE, UNUSED, detect_format, native_names, to_diffusers_key, to_native_key, unwrapped
from model.wan.geometry import describe, differences, fields_of_shapes, geometry_from, read_config
from model.wan.quantised import dequantised
from model.wan.sources import config_file, layer_formats, located, open_tensors, weight_files
from model.weights import Shapes, State, Stored, Weights, misfits, shapes_of
from utils import distributed

__all__ = [
    "Format", "LazyWeights", "check_fit", "detect_format", "fit", "geometry_of", "load_native", "load_weights",
    "native_names", "to_diffusers_key", "to_native", "to_native_key", "weight_files",
]  # fmt: skip

PATCH = "patch_embedding.weight"


def to_native(state: Mapping[str, Tensor]) -> State:
    """A state dict in either format, with wrappers' prefixes or not, under Wan's own names."""
    names = native_names(state)
    return {names[key]: value for key, value in state.items()}


def load_native(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies every parameter into `net`, cast to its dtype.

    Raises ValueError, before anything is copied, naming missing, unexpected and wrongly shaped keys.
    """
    check_fit(shapes_of(net.state_dict()), shapes_of(state))
    net.load_state_dict(dict(state))


def check_fit(wanted: Shapes, theirs: Shapes) -> None:
    """Raises ValueError naming missing, unexpected and wrongly shaped keys, and the preset that they are of."""
    if found := misfits(wanted, theirs):
        remedy = "they are incomplete, or of another kind of network"
        if (made_for := fields_of_shapes(theirs)) != fields_of_shapes(wanted):
            remedy = f"choose the geometry that they were made for ({describe(made_for)})"
        raise ValueError(f"weights do not fit this geometry: {found}: {remedy}")


def fit_network(weights: Weights, net: nn.Module, config: WanConfig) -> None:
    """`fit` for a network as it is. A sparse network takes the weights of a dense one: its gates begin at zero."""
    shapes = shapes_of(dict(net.named_parameters()))
    if not any(GATE.match(key) for key in weights.shapes):
        shapes = {key: shape for key, shape in shapes.items() if not GATE.match(key)}
    fit(weights, shapes, config)


def fit(weights: Weights, wanted: Shapes, config: WanConfig) -> None:
    """Checks weights against the network that is to get them, by headers alone.

    Gates of sparse attention that a dense network has no use for are left out, with one warning. Raises ValueError in
    one line: names or shapes that differ, or what shapes do not show, such as the number of heads.
    """
    if gates := [name for name in weights.shapes if GATE.match(name) and name not in wanted]:
        weights.shapes = {name: shape for name, shape in weights.shapes.items() if name not in set(gates)}
        if distributed.is_main():
            warnings.warn(
                f"{len(gates)} gate tensors of sparse attention (to_gate_compress) are left out: this network's "
                "attention is dense, and will not be what these weights were trained with",
                stacklevel=3,
            )
    check_fit(wanted, weights.shapes)
    stated = weights.config
    if stated is not None and (differing := differences(config, stated)):
        values = ", ".join(f"{key} {stated[key]} instead of {getattr(config, key)}" for key in differing)
        raise ValueError(
            f"weights do not fit this geometry: their config.json says {values}: choose {describe(stated)}"
        )


class LazyWeights:
    """The weights of a file, a folder or a Hub repository under Wan's own names, read one tensor at a time.

    which: 'ema' (raw where there is none), 'raw' or 'critic', of a checkpoint that has several; expert: see `located`.
    shapes: known from the headers alone. config: what the config.json beside them says, if there is one.
    linear_patch: whether their patch embedding is stored as a matrix, as NVlabs/rcm does.
    Raises ValueError, in one line, for what is not the weights of a Wan DiT.
    """

    def __init__(self, path: str | Path, which: str = "ema", expert: str | None = None) -> None:
        self.path = path
        try:
            place = located(path, expert)
            found = open_tensors(place, which)
            file = config_file(place)
            self.config = None if file is None else read_config(file)
            named = {name: found[key] for key, name in _names(found).items()}
            formats = {to_native_key(unwrapped(layer)): text for layer, text in layer_formats(place).items()}
            self._stored = dequantised(named, formats)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
        self.linear_patch = len(self._stored[PATCH].shape) == 2 if PATCH in self._stored else False
        if self.linear_patch:
            self._stored[PATCH] = _as_convolution(self._stored[PATCH])
        self.shapes: Shapes = {name: stored.shape for name, stored in self._stored.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) in this order, as stored; eight bits as the fp32 numbers that they stand for."""
        for name in names:
            yield name, self._stored[name].read()

    def geometry(self) -> WanConfig:
        """Their geometry, from config.json and shapes. Raises ValueError, naming the path."""
        try:
            return geometry_from(self.config, self.shapes)
        except ValueError as problem:
            raise ValueError(f"{self.path}: {problem}") from None


def _as_convolution(stored: Stored) -> Stored:
    """A patch embedding [dim, c * 1 * 2 * 2], applied to patches (c, frames, rows, columns), as a convolution."""
    dim, inputs = stored.shape
    if inputs % 4:
        raise ValueError(f"{PATCH} is a matrix of {inputs} inputs: known are those of patches (1, 2, 2)")
    shape = (dim, inputs // 4, 1, 2, 2)
    return Stored(shape, lambda: stored.read().reshape(shape))


def _names(keys: Iterable[str]) -> dict[str, str]:
    keys = list(keys)
    if keys and all("lora" in key or key.endswith((".alpha", ".diff", ".diff_b")) for key in keys):
        raise ValueError("this is a LoRA: give the base weights here, and lay it over them (inference.py: --lora)")
    return {key: name for key, name in native_names(keys).items() if not UNUSED.search(key)}


def geometry_of(path: str | Path, which: str = "ema", expert: str | None = None) -> WanConfig:
    """The geometry of weights, by config.json (Wan's own or Diffusers') where there is one, and by their shapes.

    path, which, expert: as LazyWeights takes them. Raises ValueError in one line.
    """
    return LazyWeights(path, which, expert).geometry()


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Loads weights in any format into `net`. Raises ValueError with one line on what does not fit."""
    weights = LazyWeights(path)
    try:
        load_native(net, dict(weights.read(weights.shapes)))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
