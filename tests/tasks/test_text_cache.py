"""Text embeddings made once: lossless, each prompt exactly once, whoever dies or runs twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.network import NetworkConfig
from model.wan.config import geometry
from tasks import text_cache
from tasks.kinds.toy import ToyData, ToyTask
from tasks.task import TaskContext
from tasks.text_cache import Encode, Shard, Source, TextCache, check, write_shard
from tests import ROOT, forked
from tests.utils.test_writing import PLACES, a_folder, files_of_at_most, names
from utils import writing
from utils.errors import UserError

GEOMETRY = geometry("toy")
SHAPES = {"text": (GEOMETRY.text_len, GEOMETRY.text_dim)}


@pytest.fixture(scope="module")
def task() -> ToyTask:
    return ToyTask(ToyData(), TaskContext(NetworkConfig("toy"), 0, torch.device("cpu")))


@pytest.fixture
def source(task: ToyTask) -> Source:
    captions = task.world.captions[:10]
    twice = [captions[0], f" {captions[1].replace(' ', '  ')}"]
    return Source.of([*captions, *twice], "encoder", SHAPES)


def write_all(out: Path, count: int, source: Source, task: ToyTask) -> list[bool]:
    return [write_shard(out, Shard(i, count), source, encoding(task)) for i in range(count)]


def encoding(task: ToyTask) -> Encode:
    return lambda prompts: task.conditioning(prompts).prompt


def cache(folder: Path) -> TextCache:
    return TextCache(folder, SHAPES)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1000])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_shards_share_the_prompts_out(size: int, count: int) -> None:
    parts = [Shard(i, count).part(size) for i in range(count)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("count", [1, 4, 16])
def test_what_is_read_is_what_the_encoder_gave(count: int, source: Source, task: ToyTask, tmp_path: Path) -> None:
    assert write_all(tmp_path, count, source, task) == [True] * count
    prompts = [source.prompts[7], *source.prompts, f"\t{source.prompts[2]}"]  # any order, and more than once
    assert torch.equal(cache(tmp_path).encode(prompts)["text"], task.conditioning(prompts).prompt["text"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["count"] == 10
    assert len(manifest["shards"]) == count
    assert sum(part["prompts"] for part in manifest["shards"].values()) == 10
    assert write_all(tmp_path, count, source, task) == [False] * count


def test_a_cache_that_does_not_serve_is_refused(source: Source, task: ToyTask, tmp_path: Path) -> None:
    write_shard(tmp_path, Shard(0, 2), source, encoding(task))
    with pytest.raises(UserError, match="holds no finished text cache: run preprocess.py text"):
        cache(tmp_path)
    write_shard(tmp_path, Shard(1, 2), source, encoding(task))
    for text_len, text_dim in ((GEOMETRY.text_len, 32), (4, GEOMETRY.text_dim)):
        with pytest.raises(UserError, match=f"6 tokens x {GEOMETRY.text_dim}, the networks take {text_len} x"):
            TextCache(tmp_path, {"text": (text_len, text_dim)})
    with pytest.raises(ValueError, match="prompt 'the digit ten' is not in the text cache .*: add it to the prompts"):
        cache(tmp_path).encode([source.prompts[0], "the digit ten"])
    path = tmp_path / Shard(1, 2).name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="shard_00001_of_00002.safetensors is absent or damaged"):
        cache(tmp_path)


def test_embeddings_that_bf16_holds_are_stored_in_it(task: ToyTask, tmp_path: Path) -> None:
    class Rounded(ToyTask):
        def conditioning(self, prompts, *visual):  # type: ignore[no-untyped-def]
            full = super().conditioning(prompts, *visual)
            return type(full)(full.prompt["text"].bfloat16().float(), full.initial)

    rounded = Rounded(ToyData(), TaskContext(NetworkConfig("toy"), 0, torch.device("cpu")))
    source = Source(task.world.captions, "encoder", SHAPES)
    for folder, encoder in (("half", rounded), ("full", task)):
        write_all(tmp_path / folder, 1, source, encoder)
    half, full = (tmp_path / name / Shard(0, 1).name for name in ("half", "full"))
    assert half.stat().st_size < 0.7 * full.stat().st_size
    assert torch.equal(
        cache(tmp_path / "half").encode(source.prompts)["text"], rounded.conditioning(source.prompts).prompt["text"]
    )


def test_a_shard_follows_the_umask(source: Source, task: ToyTask, tmp_path: Path) -> None:
    """The library alone would make it its owner's."""
    write_shard(tmp_path, Shard(0, 1), source, encoding(task))
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_killed_task_leaves_nothing_that_counts(
    source: Source, task: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shard(tmp_path, Shard(0, 2), source, encoding(task))
    with pytest.raises(UserError, match="holds no shard"):
        check(tmp_path, source)
    assert write_shard(tmp_path, Shard(1, 2), source, encoding(task))
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(UserError, match="lacks shard 0 of 2"):
        check(tmp_path, source)
    assert write_shard(tmp_path, Shard(0, 2), source, encoding(task))
    assert (tmp_path / "manifest.json").exists()


def test_a_damaged_shard_is_named_and_made_again(source: Source, task: ToyTask, tmp_path: Path) -> None:
    write_all(tmp_path, 2, source, task)
    path = tmp_path / Shard(1, 2).name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="shard_00001_of_00002.safetensors is damaged"):
        check(tmp_path, source)
    assert write_all(tmp_path, 2, source, task) == [False, True]


def test_a_shard_with_a_prompt_twice_is_no_proof(source: Source, task: ToyTask, tmp_path: Path) -> None:
    write_all(tmp_path, 2, source, task)
    wrong = [source.prompts[0], *source.prompts[:4]]
    text_cache._save(tmp_path / Shard(0, 2).name, text_cache._encode(wrong, SHAPES, encoding(task)), source.identity())
    with pytest.raises(UserError, match="does not hold prompts 0 to 4"):
        check(tmp_path, source)


def test_other_work_in_the_folder_is_refused(source: Source, task: ToyTask, tmp_path: Path) -> None:
    write_all(tmp_path, 2, source, task)
    with pytest.raises(UserError, match="holds shard_0000._of_00002.safetensors: give that number of shards"):
        write_shard(tmp_path, Shard(0, 3), source, encoding(task))
    with pytest.raises(UserError, match="by another text encoder.*another --out"):
        write_shard(tmp_path, Shard(0, 2), Source(source.prompts, "other", SHAPES), encoding(task))
    with pytest.raises(UserError, match="of other prompts .*data.negative_prompt.*another --out"):
        write_shard(tmp_path, Shard(0, 2), Source(source.prompts[1:], "encoder", SHAPES), encoding(task))
    with pytest.raises(UserError, match="unknown word 'dog'"):
        write_shard(tmp_path / "b", Shard(0, 1), Source(["the dog"], "encoder", SHAPES), encoding(task))


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    command = [
        *("preprocess.py", "text", "--config_path", "configs/wan2.2_5b/dmd_3step.yaml", "teacher=null"),
        *("critic=null", "trainer=diffusion", "data.real=true", "student.overrides={text_len: 3, text_dim: 4}"),
        *("data.kind=synthetic", "data.prompts=null", "validation.every=null"),
        *("--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")),
    ]
    made = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    others = [forked.run(1, *command, *more) for more in (["--check"], ["--shard", "2/2"])]
    said = [(done.returncode, (done.stdout + done.stderr).strip()) for done in (made, *others)]
    shard = tmp_path / "out/shard_00000_of_00001.safetensors"
    assert said[0] == (0, f"{shard}: 4 prompts")  # these, and the run's negative prompt
    embeddings = TextCache(tmp_path / "out", {"text": (3, 4)}).encode(["three", "one"])["text"]
    assert embeddings.shape == (2, 3, 4)
    assert embeddings[0].ne(embeddings[1]).all()
    assert said[1] == (0, f"{tmp_path / 'out'}: each of 4 prompts is there exactly once")
    assert said[2] == (2, "preprocess.py: error: --shard 2/2: give i/n, i from 0 to n - 1")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_place_that_takes_no_shard_is_one_line_before_anything_is_encoded(
    place: Callable[[Path], Path], source: Source, tmp_path: Path
) -> None:
    out = place(tmp_path)
    if place is a_folder:
        (out / Shard(0, 1).name).mkdir()
    before = names(tmp_path)
    with pytest.raises(UserError, match="^--out .* could not be written: .*: give another place$"):
        write_shard(out, Shard(0, 1), source, lambda prompts: pytest.fail("hours of work"))
    assert names(tmp_path) == before


def test_a_disk_that_fills_leaves_no_half_shard_and_no_half_manifest(
    source: Source, task: ToyTask, tmp_path: Path
) -> None:
    full = pytest.raises(UserError, match="^--out .* could not be written: File too large: free some space there")
    with files_of_at_most(100), full:
        write_all(tmp_path, 1, source, task)
    assert names(tmp_path) == []
    write_all(tmp_path, 1, source, task)
    (tmp_path / "manifest.json").unlink()
    with files_of_at_most(100), full:
        write_all(tmp_path, 1, source, task)
    assert names(tmp_path) == [Shard(0, 1).name]
