"""Text embeddings of a prompt file, made once: `preprocess.py` encodes shard i of n, whoever else works on the others.

    out/shard_00002_of_00008.safetensors   tokens [T, D] of its prompts in a row, lengths [N], digests [N, 32]
    out/manifest.json                      written when every prompt was found in the shards exactly once

A shard is written under another name and renamed: one that is there is complete, and is not made again.
"""

# N prompts  L text tokens of a prompt, padded  T tokens of a shard, unpadded  D text channels

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.task import Task
from utils.config import UserError

FORMAT = "1"
_NAME = re.compile(r"shard_(\d{5})_of_(\d{5})\.safetensors")


@dataclass(frozen=True)
class Shard:
    """Which part: number `index` (from 0) of `count` parts of nearly the same size, in the file's order."""

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
    """What is encoded, and by what. encoder: a hash that differs where embeddings would."""

    prompts: Sequence[str]
    encoder: str

    def identity(self) -> dict[str, str]:
        """What every shard of one folder must have in common."""
        every = hashlib.sha256(b"".join(digest(prompt) for prompt in self.prompts)).hexdigest()
        return {"format": FORMAT, "prompts": every, "encoder": self.encoder}


def digest(prompt: str) -> bytes:
    """32 bytes that stand for a prompt."""
    return hashlib.sha256(prompt.encode()).digest()


def write_shard(out: Path, shard: Shard, source: Source, task: Task) -> bool:
    """Encodes one shard; False where it was there already. The last one to finish writes the manifest.

    Raises UserError where `out` holds the work of another prompt file, encoder or split, or cannot be written.
    """
    path, identity = out / shard.name, source.identity()
    _refuse_others(out, shard.count)
    made = not _is_complete(path, identity)
    if made:
        _save(path, _encode([source.prompts[i] for i in shard.part(len(source.prompts))], task), identity)
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
    manifest = {**source.identity(), "count": len(source.prompts), "shards": files}
    partial = out / f".manifest.{uuid.uuid4().hex}"  # two tasks may finish last at once
    partial.write_text(json.dumps(manifest, indent=1))
    os.replace(partial, out / "manifest.json")
    return manifest


def read_embeddings(path: Path, text_len: int) -> Tensor:
    """All embeddings [N, L, D] of a shard, fp32, zero after each prompt's tokens: what the encoder gave."""
    tokens, lengths = _read(path, "tokens").float(), _read(path, "lengths").tolist()
    out_NLD = torch.zeros(len(lengths), text_len, tokens.shape[1])
    for row, part in zip(out_NLD, tokens.split(lengths), strict=True):
        row[: len(part)] = part
    return out_NLD


def _encode(prompts: Sequence[str], task: Task) -> dict[str, Tensor]:
    """A shard's tensors. Raises UserError for a prompt that the encoder refuses."""
    try:
        embeddings = [_unpadded(task.conditioning([prompt]).text[0].cpu()) for prompt in prompts]
    except ValueError as problem:
        raise UserError(str(problem)) from None
    tokens_TD = torch.cat([torch.zeros(0, task.negative(1).shape[-1]), *embeddings])
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
    """Without the zero rows at the end; `read_embeddings` puts them back."""
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
