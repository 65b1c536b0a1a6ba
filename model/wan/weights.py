"""Wan DiT weights from files, under Wan's own names or Diffusers'.

The key map is a pure function of names: shapes are the same in both formats, nothing is split, joined or transposed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

PREFIXES = (
    "model.",
    "_fsdp_wrapped_module.",
    "_orig_mod.",
)  # what trainers' wrappers leave in front of, or within, names

# native name -> Diffusers' name, of modules and bare parameters
TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
BLOCK = {"modulation": "scale_shift_table", "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"} | {
    f"{native}.{part}": f"{other}.{their_part}"
    for native, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, their_part in (
        ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
    )
}  # fmt: skip


class Format(Enum):
    """Whose parameter names a state dict has."""

    NATIVE = "native"
    DIFFUSERS = "diffusers"


def detect_format(keys: Iterable[str]) -> Format:
    """Raises ValueError when the names are neither Wan's nor Diffusers'."""
    names = list(keys)
    if any(".attn1." in name or name.startswith("condition_embedder.") for name in names):
        return Format.DIFFUSERS
    if any(".self_attn." in name or name.startswith("time_projection.") for name in names):
        return Format.NATIVE
    raise ValueError(
        f"no Wan DiT: names like {names[:3]} are neither Wan's (blocks.0.self_attn.q) nor Diffusers' (attn1.to_q)"
    )


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """A key under the other format's name; one that the map does not know comes back as it is."""
    prefix, table, name = "", top, key
    if key.startswith("blocks."):
        _, index, name = key.split(".", 2)
        prefix, table = f"blocks.{index}.", block
    module, dot, leaf = name.rpartition(".")
    if name in table:
        return prefix + table[name]
    return prefix + table[module] + dot + leaf if module in table else key


_TOP_BACK, _BLOCK_BACK = ({v: k for k, v in table.items()} for table in (TOP, BLOCK))


def to_diffusers_key(key: str) -> str:
    """`blocks.0.self_attn.q.weight` -> `blocks.0.attn1.to_q.weight`."""
    return _rename(key, TOP, BLOCK)


def to_native_key(key: str) -> str:
    """The inverse of `to_diffusers_key`."""
    return _rename(key, _TOP_BACK, _BLOCK_BACK)


def native_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key of either format under Wan's own name, without those of wrappers: `model.` in front, FSDP's and
    torch.compile's anywhere. Raises ValueError when two keys become one, or they are not those of a Wan DiT."""
    plain: dict[str, str] = {}
    seen: set[str] = set()
    for key in keys:
        name = key
        for wrapper in PREFIXES[1:]:
            name = name.replace(wrapper, "")
        name = name.removeprefix(PREFIXES[0])
        if name in seen:
            raise ValueError(f"weights hold '{name}' twice under different wrappers' names: keep one")
        seen.add(name)
        plain[key] = name
    if detect_format(plain.values()) is Format.DIFFUSERS:
        return {key: to_native_key(name) for key, name in plain.items()}
    return plain


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


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def check_fit(own: Shapes, theirs: Shapes) -> None:
    """Raises ValueError naming missing, unexpected and wrongly shaped keys."""
    problems = [
        ("missing", [key for key in own if key not in theirs]),
        ("unexpected", [key for key in theirs if key not in own]),
        (
            "of another shape",
            [
                f"{key} {list(theirs[key])} instead of {list(own[key])}"
                for key in own
                if key in theirs and theirs[key] != own[key]
            ],
        ),
    ]
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems
        if keys
    ]
    if found:
        raise ValueError(
            f"weights do not fit this geometry: {'; '.join(found)}: choose the preset that they were made for"
        )


def weight_files(path: str | Path) -> list[Path]:
    """One file, or of a folder its shards as an index.json lists them, else its only file.

    Raises ValueError when there is nothing to read, or a shard is missing.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if not path.is_dir():
        raise ValueError(f"no weights at '{path}': give a .safetensors file or a folder of them")
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        files = [path / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{indices[0].name} in '{path}' names {missing[0]}, which is not there: fetch all shards")
    elif len(files) != 1 or indices:
        raise ValueError(f"'{path}' has {len(files)} .safetensors files and {len(indices)} index files: name one file")
    return files


def read_safetensors(path: str | Path) -> State:
    """The tensors of `weight_files`. Raises ValueError when there is nothing to read, or a shard is missing."""
    state: State = {}
    for file in weight_files(path):
        state |= load_file(file)
    return state


class LazyWeights:
    """The weights of a file or folder under Wan's own names, read one tensor at a time.

    shapes: known from the headers alone. Raises ValueError, in one line, for what is not the weights of a Wan DiT.
    """

    def __init__(self, path: str | Path) -> None:
        self._files: dict[str, tuple[Any, str]] = {}
        self.shapes: Shapes = {}
        try:
            for file in weight_files(path):
                opened = safe_open(file, framework="pt")
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    self._files[key] = (opened, key)
            names = native_names(list(self._files))
        except (ValueError, OSError, SafetensorError) as problem:
            raise ValueError(f"{path}: {problem}") from None
        self._files = {names[key]: found for key, found in self._files.items()}
        self.shapes = {name: tuple(f.get_slice(key).get_shape()) for name, (f, key) in self._files.items()}
        self.path = path

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) in this order, as stored."""
        for name in names:
            file, key = self._files[name]
            yield name, file.get_tensor(key)


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Loads a file or folder in either format into `net`. Raises ValueError with one line on what does not fit."""
    try:
        load_native(net, to_native(read_safetensors(path)))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
