"""Encoded prompts, made once. `preprocess.py text` encodes them in shards, which several processes may share, and
training reads them instead of loading an encoder of 11 GB.

    out/shard_00002_of_00008.safetensors   digests [N, 32] of its prompts, and what they became
    out/manifest.json                      written when every prompt was found in the shards exactly once

A prompt becomes one or several tensors. One that has tokens, [L, ...], lies in a shard without the zeros after each
prompt's last token: tokens [T, ...] of all prompts in a row, and lengths [N]. A tensor of one dimension lies there
whole: values [N, ...].

    format 2   a text [L, D] alone: tokens, lengths
    format 3   anything else: NAME.tokens and NAME.lengths, or NAME.values; `tensors` says the names and shapes

A shard is written under a temporary name and then renamed. A shard that exists is complete and is not made again.
"""

# N prompts  L text tokens of a prompt, padded  T tokens of a shard, unpadded  D text channels

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.types import Prompt, PromptShapes
from utils.errors import UserError
from utils.fields import show
from utils.reading import read_json, reading
from utils.tensor_files import save_file
from utils.writing import check_writable, whole_file, write_text, writing

AGAIN = "run preprocess.py text again"
ONE_TEXT, NAMED = "2", "3"  # formats
Encode = Callable[[Sequence[str]], Prompt]  # zero after each prompt's tokens
_NAME = re.compile(r"shard_(\d{5})_of_(\d{5})\.safetensors")


@dataclass(frozen=True)
class Shard:
    """Part number `index` (from 0) of `count` parts of nearly the same size, in the file's order."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n". Raises UserError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"--shard {text}: give i/n, i from 0 to n - 1")
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        return f"shard_{self.index:05d}_of_{self.count:05d}.safetensors"

    def part(self, size: int) -> range:
        """Its positions in a list of `size` prompts."""
        return range(self.index * size // self.count, (self.index + 1) * size // self.count)


@dataclass(frozen=True)
class Source:
    """What is encoded, and by which encoder.

    prompts: each distinct prompt once.
    encoder: a hash; encoders that give other embeddings have another one.
    shapes: of an encoded prompt's tensors, by their names.
    made_with: the encoder's settings in words.
    """

    prompts: Sequence[str]
    encoder: str
    shapes: PromptShapes
    made_with: Mapping[str, str | int | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompts: Iterable[str],
        encoder: str,
        shapes: PromptShapes,
        made_with: Mapping[str, str | int | None] | None = None,
    ) -> Source:
        """The source of prompts that may repeat."""
        first: dict[bytes, str] = {}
        for prompt in prompts:
            first.setdefault(digest(prompt), prompt)
        return cls(list(first.values()), encoder, shapes, made_with or {})

    def identity(self) -> dict[str, str]:
        """What every shard of one folder must have in common."""
        every = hashlib.sha256(b"".join(digest(prompt) for prompt in self.prompts)).hexdigest()
        common = {"prompts": every, "encoder": self.encoder}
        if is_one_text(self.shapes):
            return {"format": ONE_TEXT, **common}
        return {"format": NAMED, **common, "tensors": json.dumps(dict(self.shapes), sort_keys=True)}


def is_one_text(shapes: PromptShapes) -> bool:
    """Whether a prompt becomes a text [L, D] and nothing else."""
    return [(name, len(shape)) for name, shape in shapes.items()] == [("text", 2)]


def sizes(shapes: PromptShapes) -> list[Any]:
    """What a hash of an encoder takes of the shapes."""
    return list(shapes["text"]) if is_one_text(shapes) else [dict(shapes)]


def said(shapes: PromptShapes) -> str:
    """Shapes in words, as "pooled [8], text [6, 8]"."""
    return ", ".join(f"{name} {list(shapes[name])}" for name in sorted(shapes))


def check_shapes(encoded: Prompt, shapes: PromptShapes) -> None:
    """Raises ValueError for encoded prompts of other names, shapes or precision than the networks take."""
    found = {name: tuple(value.shape[1:]) for name, value in encoded.items()}
    if found != dict(shapes):
        raise ValueError(f"the text encoder gives {said(found)}, the networks take {said(shapes)}")
    if other := [name for name, value in encoded.items() if value.dtype != torch.float32]:
        raise ValueError(f"the text encoder gives {other[0]} in {encoded[other[0]].dtype}, and not in torch.float32")


# what a shard that is another's was made from, by the key of `Source.identity`
_OTHERWISE = {
    "prompts": "of other prompts (--prompts, validation.prompts, data.negative_prompt and diffusion.dropped_caption "
    "together)",
    "encoder": "by another text encoder, precision or cleaning (data.text)",
}


@dataclass(frozen=True)
class _Column:
    """One tensor of all prompts of a shard. prefix: of the names of its parts in the file."""

    name: str
    shape: tuple[int, ...]
    prefix: str

    @property
    def has_tokens(self) -> bool:
        return len(self.shape) > 1

    def used(self, value: Tensor) -> Tensor:
        """What is kept of one prompt's tensor, which `TextCache.encode` fills up with zeros."""
        if not self.has_tokens:
            return value.clone()
        rows = value.flatten(1).ne(0).any(dim=1).nonzero()
        return value[: int(rows[-1]) + 1 if len(rows) else 0].clone()  # a slice would hold all of it in memory

    def stored(self, used: Sequence[Tensor]) -> dict[str, Tensor]:
        """What a shard holds of all prompts, by names in the file."""
        row = self.shape[1:] if self.has_tokens else self.shape
        none = torch.zeros(0, *row)  # of the right width where there is no prompt
        if not self.has_tokens:
            return {f"{self.prefix}values": _smallest(torch.stack(list(used)) if used else none)}
        lengths = torch.tensor([len(value) for value in used], dtype=torch.int64)
        return {f"{self.prefix}tokens": _smallest(torch.cat([*used, none])), f"{self.prefix}lengths": lengths}


def _columns(shapes: PromptShapes) -> list[_Column]:
    alone = is_one_text(shapes)
    return [_Column(name, tuple(shape), "" if alone else f"{name}.") for name, shape in sorted(shapes.items())]


def digest(prompt: str) -> bytes:
    """32 bytes that stand for a prompt; white space makes no difference, as to every encoder here."""
    return hashlib.sha256(" ".join(prompt.split()).encode()).digest()


def write_shard(out: Path, shard: Shard, source: Source, encode: Encode) -> bool:
    """Encodes one shard; returns False if it exists already. The last process to finish writes the manifest.

    Raises UserError where `out` holds the work of another prompt file, encoder or split, or cannot be written.
    """
    path, identity = out / shard.name, source.identity()
    with writing("--out", out):
        _refuse_others(out, shard.count)
    made = not _is_complete(path, identity)
    if made:
        check_writable(path, "--out")
        part = [source.prompts[i] for i in shard.part(len(source.prompts))]
        _save(path, _encode(part, source.shapes, encode), identity)
    if all(_is_complete(out / Shard(i, shard.count).name, identity) for i in range(shard.count)):
        check(out, source)
    return made


def check(out: Path, source: Source) -> dict[str, object]:
    """Reads the shards, proves that they hold every prompt exactly once, in order, and writes the manifest.

    Raises UserError naming the shards that are absent, and the first prompt that is not where it should be.
    """
    count = _split_of(out)
    shards = [Shard(i, count) for i in range(count)]
    if missing := [str(shard.index) for shard in shards if not (out / shard.name).is_file()]:
        raise UserError(f"{out} lacks shard {', '.join(missing)} of {count}: run them, with the same number of shards")
    expected = _digests(source.prompts)
    files: dict[str, dict[str, int]] = {}
    for shard in shards:
        path = out / shard.name
        if not _is_complete(path, source.identity()):
            raise UserError(f"{path} is damaged: delete it and run shard {shard.index} of {count} again")
        held, part = _read(path, "digests"), shard.part(len(source.prompts))
        wanted = expected[part.start : part.stop]
        if not torch.equal(held, wanted):
            raise UserError(f"{path} does not hold prompts {part.start} to {part.stop - 1}: delete it and run it again")
        lengths = [_read(path, f"{c.prefix}lengths") for c in _columns(source.shapes) if c.has_tokens]
        tokens = sum(int(of_each.sum()) for of_each in lengths)
        files[shard.name] = {"first": part.start, "prompts": len(part), "tokens": tokens}
    manifest = {
        **source.identity(),
        "made_with": dict(source.made_with),
        "count": len(source.prompts),
        "shards": files,
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1), "--out")  # two tasks may finish last at once
    return manifest


class TextCache:
    """Reads a finished folder: `encode` gives what the encoder gave, bit for bit, in fp32.

    Only the digests are held in memory; embeddings are read from the mapped files. Raises UserError for a folder that
    is not finished or not whole, or whose tensors do not fit those of the networks.
    """

    def __init__(self, folder: Path, shapes: PromptShapes) -> None:
        self.folder, self.shapes = folder, shapes
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder} holds no finished text cache: run preprocess.py text, every shard of it")
        manifest = read_json("text cache", folder / "manifest.json", AGAIN)
        self._places: dict[bytes, tuple[int, int]] = {}  # digest -> shard, place in it
        self._shards = []
        with reading("text cache", folder / "manifest.json", AGAIN):
            self.encoder: str = manifest["encoder"]
            self.made_with: dict[str, str | int | None] = dict(manifest.get("made_with", {}))  # older ones do not say
            self._check_names(manifest)
            known = ("format", "prompts", "encoder", "tensors")
            identity: dict[str, str] = {key: manifest[key] for key in known if key in manifest}
            for number, name in enumerate(manifest["shards"]):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{show(name)} is no name of a shard")
                if not _is_complete(folder / name, identity):
                    raise UserError(f"{folder / name} is absent or damaged: {AGAIN}")
                shard = _OpenShard(folder / name, shapes)
                self._shards.append(shard)
                self._places.update({key: (number, place) for place, key in enumerate(shard.digests)})

    def _check_names(self, manifest: Mapping[str, Any]) -> None:
        named = None if manifest["format"] == ONE_TEXT else json.loads(manifest["tensors"])
        held = {"text": 2} if named is None else {name: len(shape) for name, shape in named.items()}
        if held != {name: len(shape) for name, shape in self.shapes.items()}:
            raise UserError(
                f"{self.folder} holds {'text' if named is None else said(named)} of each prompt, the networks take "
                f"{said(self.shapes)}: make a cache with the encoder of these networks"
            )

    def contents(self) -> list[str]:
        """Its encoder, then each prompt, as `Task.contents` has them: their hashes are compared, and not shown."""
        made_with = " ".join(str(value) for value in self.made_with.values()) or "an encoder that it does not name"
        prompts = [f"the embedding of a prompt\0{key.hex()}" for key in self._places]
        return [f"{len(prompts)} prompts of {made_with}\0{self.encoder}", *prompts]

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts that the cache does not hold."""
        return [prompt for prompt in prompts if digest(prompt) not in self._places]

    def encode(self, prompts: Sequence[str]) -> Prompt:
        """The tensors [B, ...] of prompts. Raises ValueError naming a prompt that is not in the cache, or a shard with
        numbers that are not finite."""
        if missing := self.missing(prompts):
            raise ValueError(
                f"prompt {missing[0][:60]!r} is not in the text cache {self.folder}: add it to the prompts of "
                "preprocess.py text, or name the encoder too (data.text.encoder)"
            )
        out = {name: torch.zeros(len(prompts), *shape) for name, shape in self.shapes.items()}
        for row, prompt in enumerate(prompts):
            number, place = self._places[digest(prompt)]
            self._shards[number].fill({name: values[row] for name, values in out.items()}, place)
        return out


class _OpenShard:
    """A shard, whose tensors are read where they are asked for. Raises UserError where they do not fit `shapes`."""

    def __init__(self, path: Path, shapes: PromptShapes) -> None:
        self.path, self.columns = path, _columns(shapes)
        self._ends: dict[str, list[int]] = {}  # of each prompt's tokens
        with reading("text cache", path, AGAIN):
            self._file = safe_open(path, "pt")
            digests = self._file.get_tensor("digests")
            if digests.dtype != torch.uint8 or digests.shape[1:] != (32,):
                raise ValueError(f"its digests are {list(digests.shape)} of {digests.dtype}")
            self.digests = [key.tobytes() for key in digests.numpy()]  # of its prompts, in order
            for column in self.columns:
                if column.has_tokens:
                    self._open_tokens(column)
                elif (found := self._shape(f"{column.prefix}values")) != list(column.shape):
                    raise self._misfit(f"{column.name} {found}", str(list(column.shape)))

    def _open_tokens(self, column: _Column) -> None:
        lengths = self._file.get_tensor(f"{column.prefix}lengths")
        tokens = self._file.get_slice(f"{column.prefix}tokens").get_shape()[0]
        whole = lengths.dtype == torch.int64 and lengths.shape == (len(self.digests),)
        if not whole or (lengths < 0).any() or int(lengths.sum()) != tokens:
            raise ValueError(f"it has {tokens} tokens of {column.name}, and lengths of other ones")
        found, longest = self._shape(f"{column.prefix}tokens"), max(lengths.tolist(), default=0)
        length, *wanted = column.shape
        if found != wanted or longest > length:
            widths, taken = " x ".join(map(str, found)), " x ".join(map(str, column.shape))
            raise self._misfit(f"{column.name} of up to {longest} tokens x {widths}", taken)
        self._ends[column.name] = [0, *lengths.cumsum(0).tolist()]

    def _shape(self, name: str) -> list[int]:
        """Of one row."""
        return list(self._file.get_slice(name).get_shape()[1:])

    def _misfit(self, held: str, taken: str) -> UserError:
        return UserError(
            f"{self.path.parent} holds {held}, the networks take {taken}: make a cache with the encoder of these "
            "networks"
        )

    def fill(self, row: Mapping[str, Tensor], place: int) -> None:
        """Writes the tensors of the prompt at a place into zeros of their shapes. Raises ValueError."""
        for column in self.columns:
            with reading("text cache", self.path, AGAIN):
                if column.has_tokens:
                    first, end = self._ends[column.name][place : place + 2]
                    read = self._file.get_slice(f"{column.prefix}tokens")[first:end]
                    into = row[column.name][: end - first]
                else:
                    read = self._file.get_slice(f"{column.prefix}values")[place : place + 1][0]
                    into = row[column.name]
                if not read.is_floating_point():
                    raise ValueError(f"its {column.name} is of {read.dtype}, and not of real numbers")
                into.copy_(read)
            if not into.isfinite().all():
                raise UserError(f"{self.path} holds {column.name} that is not finite: delete it and make it again")


def _encode(prompts: Sequence[str], shapes: PromptShapes, encode: Encode) -> dict[str, Tensor]:
    """A shard's tensors. Raises UserError for a prompt that the encoder refuses, and for one that it gives other
    tensors than these shapes or numbers that are not finite."""
    from tqdm import tqdm

    columns = _columns(shapes)
    used: dict[str, list[Tensor]] = {column.name: [] for column in columns}
    try:
        for prompt in tqdm(prompts, unit="prompt", disable=None, mininterval=1):
            encoded = encode([prompt])
            check_shapes(encoded, shapes)
            if wrong := [name for name, value in encoded.items() if not value.isfinite().all()]:
                raise ValueError(f"prompt {prompt[:60]!r}: the text encoder gives {wrong[0]} that is not finite")
            for column in columns:
                used[column.name].append(column.used(encoded[column.name][0].cpu()))
    except ValueError as problem:
        raise UserError(str(problem)) from None
    stored = {"digests": _digests(prompts)}
    for column in columns:
        stored |= column.stored(used[column.name])
    return stored


def _smallest(values: Tensor) -> Tensor:
    """In bf16 where that loses nothing, as where the encoder computed in it."""
    return values.bfloat16() if torch.equal(values.bfloat16().float(), values) else values


def _digests(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([list(digest(prompt)) for prompt in prompts], dtype=torch.uint8).view(-1, 32)


def _save(path: Path, tensors: dict[str, Tensor], identity: dict[str, str]) -> None:
    with whole_file(path, "--out") as partial:
        save_file(tensors, partial, identity)


def _refuse_others(out: Path, count: int) -> None:
    for path in out.glob("shard_*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[2]) != count:
            raise UserError(f"{out} holds {path.name}: give that number of shards instead of {count}, or another --out")


def _split_of(out: Path) -> int:
    counts = sorted({int(m[2]) for path in out.glob("shard_*") if (m := _NAME.fullmatch(path.name))})
    if not counts:
        raise UserError(f"{out} holds no shard: run preprocess.py with --shard first")
    if len(counts) > 1:
        raise UserError(f"{out} holds shards of {' and '.join(map(str, counts))}: delete those of one split")
    return counts[0]


def _is_complete(path: Path, identity: dict[str, str]) -> bool:
    """False for a file that is absent or damaged. Raises UserError for one of other prompts or another encoder."""
    try:
        with reading("text cache", path), safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except UserError:
        return False
    for key, value in identity.items():
        if found.get(key) != value:
            other = _OTHERWISE.get(key, f"with another {key} ({show(found.get(key))})")
            raise UserError(
                f"{path} was made {other}: all prompts are encoded anew: give another --out, and name it as "
                f"data.text.cache, or delete {path.parent}"
            )
    return True


def _read(path: Path, name: str) -> Tensor:
    with reading("text cache", path, AGAIN), safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
