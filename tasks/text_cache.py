"""Text embeddings of prompts, made once. `preprocess.py text` encodes them in shards, which several processes may
share, and training reads them instead of loading an encoder of 11 GB.

    out/shard_00002_of_00008.safetensors   tokens [T, D] of its prompts in a row, lengths [N], digests [N, 32]
    out/manifest.json                      written when every prompt was found in the shards exactly once

A shard is written under a temporary name and then renamed. A shard that exists is complete and is not made again.
"""

# N prompts  L text tokens of a prompt, padded  T tokens of a shard, unpadded  D text channels

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError

FORMAT = "2"
Encode = Callable[[Sequence[str]], Tensor]  # prompts -> [B, L, D], zero after each prompt's tokens
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
    made_with: the encoder's settings in words.
    """

    prompts: Sequence[str]
    encoder: str
    made_with: Mapping[str, str | int | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls, prompts: Iterable[str], encoder: str, made_with: Mapping[str, str | int | None] | None = None
    ) -> Source:
        """The source of prompts that may repeat."""
        first: dict[bytes, str] = {}
        for prompt in prompts:
            first.setdefault(digest(prompt), prompt)
        return cls(list(first.values()), encoder, made_with or {})

    def identity(self) -> dict[str, str]:
        """What every shard of one folder must have in common."""
        every = hashlib.sha256(b"".join(digest(prompt) for prompt in self.prompts)).hexdigest()
        return {"format": FORMAT, "prompts": every, "encoder": self.encoder}


def digest(prompt: str) -> bytes:
    """32 bytes that stand for a prompt; white space makes no difference, as to every encoder here."""
    return hashlib.sha256(" ".join(prompt.split()).encode()).digest()


def write_shard(out: Path, shard: Shard, source: Source, encode: Encode) -> bool:
    """Encodes one shard; returns False if it exists already. The last process to finish writes the manifest.

    Raises UserError where `out` holds the work of another prompt file, encoder or split, or cannot be written.
    """
    path, identity = out / shard.name, source.identity()
    _refuse_others(out, shard.count)
    made = not _is_complete(path, identity)
    if made:
        _save(path, _encode([source.prompts[i] for i in shard.part(len(source.prompts))], encode), identity)
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
        files[shard.name] = {"first": part.start, "prompts": len(part), "tokens": int(_read(path, "lengths").sum())}
    manifest = {
        **source.identity(),
        "made_with": dict(source.made_with),
        "count": len(source.prompts),
        "shards": files,
    }
    partial = out / f".manifest.{uuid.uuid4().hex}"  # two tasks may finish last at once
    partial.write_text(json.dumps(manifest, indent=1))
    os.replace(partial, out / "manifest.json")
    return manifest


class TextCache:
    """Reads a finished folder: `encode` gives what the encoder gave, bit for bit, [B, L, D] in fp32.

    Only the digests are held in memory; embeddings are read from the mapped files. Raises UserError for a folder that
    is not finished or not whole, or whose embeddings do not fit [text_len, text_dim].
    """

    def __init__(self, folder: Path, text_len: int, text_dim: int) -> None:
        self.folder, self.text_len, self.text_dim = folder, text_len, text_dim
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder} holds no finished text cache: run preprocess.py text, every shard of it")
        manifest = json.loads((folder / "manifest.json").read_text())
        self.encoder: str = manifest["encoder"]
        self.made_with: dict[str, str | int | None] = manifest.get("made_with", {})  # older caches do not say
        self._places: dict[bytes, tuple[int, int, int]] = {}  # digest -> shard, first token, tokens
        self._files = []
        for number, name in enumerate(manifest["shards"]):
            identity = {key: manifest[key] for key in ("format", "prompts", "encoder")}
            if not _is_complete(folder / name, identity):
                raise UserError(f"{folder / name} is absent or damaged: run preprocess.py text again")
            file = safe_open(folder / name, "pt")
            lengths, width = file.get_tensor("lengths"), file.get_slice("tokens").get_shape()[1]
            longest = max(lengths.tolist(), default=0)
            if width != text_dim or longest > text_len:
                raise UserError(
                    f"{folder} holds embeddings of up to {longest} tokens x {width}, the networks take {text_len} x "
                    f"{text_dim}: make a cache with the encoder of these networks"
                )
            ends = lengths.cumsum(0).tolist()
            keys = file.get_tensor("digests").numpy()
            for key, length, end in zip(keys, lengths.tolist(), ends, strict=True):
                self._places[key.tobytes()] = (number, end - length, length)
            self._files.append(file)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts that the cache does not hold."""
        return [prompt for prompt in prompts if digest(prompt) not in self._places]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D] of prompts. Raises ValueError naming a prompt that is not in the cache."""
        if missing := self.missing(prompts):
            raise ValueError(
                f"prompt {missing[0][:60]!r} is not in the text cache {self.folder}: add it to the prompts of "
                "preprocess.py text, or name the encoder too (data.text.encoder)"
            )
        out_BLD = torch.zeros(len(prompts), self.text_len, self.text_dim)
        for row, prompt in zip(out_BLD, prompts, strict=True):
            number, start, length = self._places[digest(prompt)]
            row[:length] = self._files[number].get_slice("tokens")[start : start + length]
        return out_BLD


def _encode(prompts: Sequence[str], encode: Encode) -> dict[str, Tensor]:
    """A shard's tensors. Raises UserError for a prompt that the encoder refuses."""
    from tqdm import tqdm

    try:
        bar = tqdm(prompts, unit="prompt", disable=None, mininterval=1)
        embeddings = [_unpadded(encode([prompt])[0].cpu()) for prompt in bar]
        tokens_TD = torch.cat([*embeddings, encode([])[:, 0].cpu()])  # of the right width where there is no prompt
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if torch.equal(tokens_TD.bfloat16().float(), tokens_TD):
        tokens_TD = tokens_TD.bfloat16()  # nothing is lost: the encoder computed in bf16
    return {
        "tokens": tokens_TD,
        "lengths": torch.tensor([len(embedding) for embedding in embeddings], dtype=torch.int64),
        "digests": _digests(prompts),
    }


def _digests(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([list(digest(prompt)) for prompt in prompts], dtype=torch.uint8).view(-1, 32)


def _save(path: Path, tensors: dict[str, Tensor], identity: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, identity)
        os.replace(partial, path)
    except (OSError, SafetensorError) as problem:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {problem}") from None


def _unpadded(embedding_LD: Tensor) -> Tensor:
    """The embedding without the zero rows at its end; `TextCache.encode` puts them back."""
    used = embedding_LD.ne(0).any(dim=1).nonzero()
    return embedding_LD[: int(used[-1]) + 1 if len(used) else 0]


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
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    for key, value in identity.items():
        if found.get(key) != value:
            raise UserError(f"{path} is of another {key} ({found.get(key)}): give another --out, or delete this folder")
    return True


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
