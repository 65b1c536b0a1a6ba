"""Every reader with seeded mutations of a good file: what it cannot read is one line, within a memory and a CPU limit.

`python -m tests.fuzz.test_readers` prints the counts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.load import load_run
from model.wan.lora_files import LoraFile
from model.wan.weights import LazyWeights
from tasks.text_cache import Shard, Source, TextCache, write_shard
from tests.fuzz.program import limit
from tests.nets import random_net
from utils.checkpoint_folder import load_state
from utils.data.buckets import Size
from utils.data.clips import decode_end, decode_image, probe
from utils.data.latents import open_latents
from utils.data.media import IMAGES, Media, Part, find_media
from utils.data.order import ShardedOrder
from utils.data.parquet import write_parquet
from utils.data.prompts import load_prompts
from utils.data.safetensors_shards import write_latents, write_trajectories
from utils.data.stream import Sample, Stream
from utils.video import write_video

MUTATIONS, SAMPLE = 30, 1
MEMORY = 3 << 30  # for all mutations of a reader
TARGETS = {f"blocks.0.self_attn.q.lora_{part}.weight" for part in "AB"}


def flipped(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 4, 32))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def retyped(data: bytes, draw: random.Random) -> bytes:
    """Another type where one is named, else letters for digits or digits for letters."""
    swaps = [(b"F32", b"I32"), (b"F32", b"C64"), (b'"', b"1"), (b": ", b":["), (b"1", b"x"), (b"e", b"7"), (b"{", b"[")]
    present = [swap for swap in swaps if swap[0] in data]
    return data.replace(*draw.choice(present), draw.choice((1, -1))) if present else data[::-1]


def enlarged(data: bytes, draw: random.Random) -> bytes:
    """A number of many digits, a byte repeated often, or a length of 8 bytes that is enormous."""
    place = draw.randrange(len(data))
    digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if digits and draw.random() < 0.5:
        place = draw.choice(digits)
        return data[:place] + b"9" * draw.choice((3, 12, 5000)) + data[place:]
    if draw.random() < 0.5:
        return data[:place] + data[place : place + 1] * 200_000 + data[place:]
    return data[:place] + b"\xff" * 7 + b"\x7f" + data[place + 8 :]


def shortened(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((0, 1, len(data) // 2, len(data) - 1, draw.randrange(len(data))))]


KINDS: list[Callable[[bytes, random.Random], bytes]] = [shortened, flipped, retyped, enlarged]


@dataclass(frozen=True)
class Reader:
    """make: writes a good file into a folder and returns it; read: reads the folder, all of it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def _weights(folder: Path, suffix: str = "safetensors") -> Path:
    state = {name: value.detach() for name, value in random_net(1).state_dict().items()}
    file = folder / f"x.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def _read_weights(folder: Path) -> None:
    weights = LazyWeights(next(file for file in folder.iterdir() if file.name != "x.json"))
    for _ in weights.read(weights.shapes):
        pass


def _index(folder: Path) -> Path:
    _weights(folder).rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(random_net(1).state_dict(), "model-00001-of-00001.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": names}))
    return file


def _folder_of_weights(folder: Path) -> None:
    weights = LazyWeights(folder)
    for _ in weights.read(weights.shapes):
        pass


def _lora(folder: Path) -> Path:
    save_file({name: torch.randn(48, 2).T.contiguous() if "_A" in name else torch.randn(48, 2) for name in TARGETS},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4.0, "alpha_pattern": {"to_q": 2.0}}))
    return folder / "adapter_model.safetensors"


def _lora_config(folder: Path) -> Path:
    _lora(folder)
    return folder / "adapter_config.json"


def _read_lora(folder: Path) -> None:
    file = LoraFile(folder, {"blocks.0.self_attn.q.weight": (4, 4)})
    for module, change in file.changes.items():
        file.factor(module, change)
        for stored in (change.down, change.up):
            if stored is not None:
                stored.read()


def _prompts(suffix: str, text: str) -> Reader:
    def make(folder: Path) -> Path:
        (folder / f"p.{suffix}").write_text(text)
        return folder / f"p.{suffix}"

    return Reader(make, lambda folder: load_prompts(folder / f"p.{suffix}"))


def _prompt_table(folder: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"]}), folder / "p.parquet")
    return folder / "p.parquet"


def _samples() -> list[Sample]:
    return [Sample(f"s{i}", "a cat", torch.randn(2, 6), torch.randn(2, 3, 4, 4)) for i in range(4)]


def _latents(folder: Path) -> Path:
    write_latents(folder / "a.safetensors", _samples(), normalised=True)
    return folder / "a.safetensors"


def _trajectories(folder: Path) -> Path:
    write_trajectories(folder / "a.safetensors", torch.randn(2, 2, 2, 3, 4, 4), torch.tensor([1.0, 0.0]), ["a", "b"])
    return folder / "a.safetensors"


def _rows(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    write_parquet(folder / "a.parquet", _samples(), normalised=True)
    return folder / "a.parquet"


def _lmdb(folder: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=1 << 20) as made, made.begin(write=True) as view:
        view.put(b"latents_shape", b"4 2 3 4 4")
        for i in range(4):
            view.put(f"latents_{i}_data".encode(), np.ones((2, 3, 4, 4), np.float16).tobytes())
            view.put(f"prompts_{i}_data".encode(), b"a cat")
    return folder / "data.mdb"


def _read_latents(folder: Path) -> None:
    source = open_latents(folder)
    source.shapes()
    source.captions()
    Stream(source, ShardedOrder(source.shard_sizes, 0), 0, max_corrupt=1.0).samples(range(sum(source.shard_sizes)))


def _png(folder: Path) -> Path:
    return write_video(folder / "a.png", torch.rand(1, 3, 16, 16), 8)


def _mp4(folder: Path) -> Path:
    pytest.importorskip("av")
    return write_video(folder / "a.mp4", torch.rand(4, 3, 16, 16), 8)


def _read_mp4(folder: Path) -> None:
    media = Media("a.mp4", Part(folder / "a.mp4"), "")
    probe(media)
    decode_end(media, Size(2, 16, 16), last=True)


def _captions(folder: Path) -> Path:
    _png(folder)
    (folder / "a.json").write_text('{"caption": "a cat on 7 mats"}')
    return folder / "a.json"


def _table(folder: Path) -> Path:
    _png(folder)
    (folder / "t.jsonl").write_text('{"file": "a.png", "caption": "a cat"}\n')
    return folder / "t.jsonl"


def _cache(folder: Path) -> Path:
    made = {name: torch.randn(1, 4, 6) for name in ("a", "b")}
    source = Source.of(["a", "b"], "encoder", {"text": (4, 6)})
    write_shard(folder, Shard(0, 1), source, lambda prompts: {"text": made[prompts[0]]})
    return folder / "manifest.json"


def _cache_shard(folder: Path) -> Path:
    _cache(folder)
    return folder / "shard_00000_of_00001.safetensors"


def _recipe(folder: Path) -> Path:
    (folder / "r.yaml").write_text(Path("configs/toy/dmd_4step.yaml").read_text())
    return folder / "r.yaml"


def _state(folder: Path) -> Path:
    here = Path("tests/fixtures/old_runs/gan/checkpoints/step_00000002")
    shutil.copytree(here, folder / here.name)
    return folder / here.name / "state.json"


READERS = {
    "weights": Reader(_weights, _read_weights),
    "weights, torch": Reader(lambda folder: _weights(folder, "pt"), _read_weights),
    "index of shards": Reader(_index, _folder_of_weights),
    "LoRA": Reader(_lora, _read_lora),
    "LoRA's config": Reader(_lora_config, _read_lora),
    "prompts, text": _prompts("txt", "a cat\na dog\n"),
    "prompts, csv": _prompts("csv", 'prompt\n"a cat"\n"7 dogs"\n'),
    "prompts, jsonl": _prompts("jsonl", '{"prompt": "a cat"}\n{"prompt": "1 dog"}\n'),
    "prompts, parquet": Reader(_prompt_table, lambda folder: load_prompts(folder / "p.parquet")),
    "latents, safetensors": Reader(_latents, _read_latents),
    "trajectories, safetensors": Reader(_trajectories, _read_latents),
    "latents, parquet": Reader(_rows, _read_latents),
    "latents, LMDB": Reader(_lmdb, _read_latents),
    "image": Reader(_png, lambda folder: decode_image(Media("a.png", Part(folder / "a.png"), ""), Size(1, 8, 8))),
    "video": Reader(_mp4, _read_mp4),
    "caption": Reader(_captions, lambda folder: [m.text() for m in find_media(folder, IMAGES)[0]]),
    "table of captions": Reader(_table, lambda folder: find_media(folder, IMAGES, folder / "t.jsonl")),
    "text cache": Reader(_cache, lambda folder: TextCache(folder, {"text": (4, 6)}).encode(["a", "b"])),
    "text cache, shard": Reader(_cache_shard, lambda folder: TextCache(folder, {"text": (4, 6)}).encode(["a", "b"])),
    "recipe": Reader(_recipe, lambda folder: load_run(folder / "r.yaml")),
    "state.json": Reader(_state, lambda folder: load_state(folder / "step_00000002")),
}


def outcome(read: Callable[[], object]) -> str:
    """ "one line" or "read", or else what went wrong."""
    try:
        read()
    except ValueError as problem:
        if type(problem) is ValueError and problem.__traceback__ is not None and not str(problem):
            return "an empty error"
        return "one line" if len(str(problem)) < 1500 else f"a line of {len(str(problem))} characters"
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return "read"


def fuzzed(name: str, folder: Path, count: int) -> Counter[str]:
    """What became of `count` mutations, each read in a child process that has little memory and time."""
    reader, found = READERS[name], Counter[str]()
    good = folder / "good"
    good.mkdir(parents=True)
    file = reader.make(good)
    data, place = file.read_bytes(), file.relative_to(good)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            limit(MEMORY)
            for number in range(count):
                draw = random.Random(f"{name} {number}")
                kind = KINDS[number % len(KINDS)]
                bad = folder / str(number)
                shutil.copytree(good, bad)
                (bad / place).write_bytes(kind(data, draw))
                os.write(send, f"{number} {kind.__name__}: ".encode())
                os.write(send, (outcome(lambda bad=bad: reader.read(bad)).replace("\n", " ") + "\n").encode())  # type: ignore[misc]
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as lines:
        said = lines.read()
    _, status = os.waitpid(child, 0)
    for line in said.splitlines():
        case, _, result = line.partition(": ")
        found[result if result in ("one line", "read") else f"{case}: {result or 'died'}"] += 1
    if os.WIFSIGNALED(status):
        found[f"signal {signal.Signals(os.WTERMSIG(status)).name}"] += 1
    return found


def check(name: str, folder: Path, count: int) -> None:
    found = fuzzed(name, folder, count)
    assert found["one line"] + found["read"] == count == found.total(), found
    assert found["one line"] or count < len(KINDS), "no mutation was noticed"


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_line(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "x", SAMPLE)


@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_one_line_each(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "x", MUTATIONS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    total = Counter[str]()
    for name in READERS:
        with tempfile.TemporaryDirectory() as made:
            counts = fuzzed(name, Path(made) / "x", MUTATIONS)
        print(f"{name}: {dict(counts)}", flush=True)
        total += counts
    print(f"all: {dict(total)}")
